"""Readers: the files of a data set, whatever is wrong with them, to `Annotations`; one file for each format.

reader.py         what a reader is; what those of one label file per image have in common
coco_layout.py    where COCO data sets keep things
coco_json.py      a COCO file's JSON
coco.py           reader: COCO
voc.py            reader: Pascal VOC
yolo_layout.py    where YOLO data sets keep things
yolo_paths.py     what its paths stand for
yolo_labels.py    the label file of each image
yolo_rows.py      what the lines of a label file say
yolo.py           reader: YOLO
"""
