"""Reader: Pascal VOC.

layout.py  where its XML files and lists lie, and which of them a split has
reader.py  one split of them to `Annotations`
"""
