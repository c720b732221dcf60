"""YOLO: from the file that describes a data set to its images, label files and boxes.

layout.py    where YOLO data sets keep things
paths.py     what their paths stand for
labels.py    the label file of each image
rows.py      what the lines of a label file say
names.py     the classes, and where lists of them disagree
reader.py    reader: YOLO
"""
