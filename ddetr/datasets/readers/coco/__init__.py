"""COCO: from a folder to its annotation files, their JSON and the boxes.

layout.py    where COCO data sets keep things
content.py   an annotation file's JSON
ids.py       which image and which class an id means
merge.py     several files of one split to one content
mask.py      the box around a mask
reader.py    reader: COCO
"""
