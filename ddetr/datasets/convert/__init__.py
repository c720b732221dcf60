"""Any data set that is read, written anew as COCO, YOLO or Pascal VOC: images, boxes and classes.

Images come upright: those that EXIF turns are encoded anew, so that every program sees the same pixels below the boxes;
all others are copied byte by byte. Nothing is written where something is, and never half of it.

source.py       what is converted: all splits, with the classes of the training split
conversion.py   `convert()`: names that every system takes, images, and what changed
written.py      the annotations in each format
"""
