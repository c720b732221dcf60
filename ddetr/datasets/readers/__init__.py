"""Readers: the files of a data set, whatever is wrong with them, to `Annotations`; one file for each format.

reader.py         what a reader is; what those of one label file per image have in common
split_lists.py    text files that list the images of splits, where no format says that they do
foreign.py        what a folder is that no reader knows, and what converts it
side_by_side.py   several data sets in one folder, of which nothing says that they belong together
file_names.py     the files that names in annotations mean: addresses, Windows, other folders
coco/             reader: COCO
label_folders.py  what readers of folders of label files share: splits by folders, images beside, boxes around shapes
voc/              reader: Pascal VOC
kitti.py          reader: KITTI
cvat.py           reader: CVAT for images
labelme.py        reader: LabelMe
yolo/             reader: YOLO
box_meaning.py    whether a split's boxes look as if they meant something else than its format says
named_images.py   images that one file of annotations names: how they are found, how their objects are collected
json_files.py     JSON files: their text, and those that hold a list of images
csv_boxes.py      reader: CSV tables of boxes (Roboflow, TensorFlow, RetinaNet, OpenImages, makesense.ai)
label_studio.py   reader: Label Studio's JSON and JSON-MIN
via.py            reader: VGG Image Annotator's (VIA) JSON and CSV
createml.py       reader: Create ML's JSON
huggingface.py    reader: Hugging Face image folders with metadata.jsonl or .csv
"""
