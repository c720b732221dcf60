"""Readers: the files of a data set, whatever is wrong with them, to `Annotations`; one file for each format.

reader.py         what a reader is; what those of one label file per image have in common
file_names.py     the files that names in annotations mean: addresses, Windows, other folders
coco_layout.py    where COCO data sets keep things
coco_json.py      a COCO file's JSON
coco_mask.py      the box around a mask
coco.py           reader: COCO
voc.py            reader: Pascal VOC
yolo.py           reader: YOLO
"""
