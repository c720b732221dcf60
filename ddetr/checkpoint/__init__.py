"""Trained weights on disk: our one published format, and the formats of other projects read into our models.

published.py      our format: `Checkpoint`, `save_checkpoint`, `load_checkpoint`, `build_from_checkpoint`
pretrained.py     a trained network by a name: `from_pretrained`
transfer.py       any weights into any model of ours: `load_weights`
report.py         what became of every tensor: `LoadReport`
foreign.py        the files of other projects, under the official names; `to_official_state_dict`
names.py          the names of other projects, and where in a file the detector is
training_parts.py what a file holds for training alone
detectors.py      any file of a detector as a `Checkpoint`, whoever wrote it: `read_detector`
preprocessing.py  how images reach a network of transformers
heads.py          which head of a file each head of a model starts from
description.py    what a file is, for people and for programs: `ddetr weights show`
class_rows.py     which row of a class head belongs to which class
class_synonyms.py names of the same class in several data sets
coco_classes.py   COCO's class names and ids, which foreign files seldom hold

convert.py        a checkpoint as a file of ours or of other projects: `convert_checkpoint`
written_names.py  the official names in those of other projects
written_rows.py   class heads with the rows that other projects have
transformers_folder.py   config.json, weights and preprocessor_config.json for transformers
"""

from ddetr.checkpoint.convert import Converted, convert_checkpoint
from ddetr.checkpoint.detectors import read_detector
from ddetr.checkpoint.foreign import to_official_state_dict
from ddetr.checkpoint.pretrained import from_pretrained
from ddetr.checkpoint.published import Checkpoint, build_from_checkpoint, load_checkpoint, save_checkpoint
from ddetr.checkpoint.report import LoadReport
from ddetr.checkpoint.transfer import load_weights

__all__ = [
    "Checkpoint",
    "Converted",
    "LoadReport",
    "build_from_checkpoint",
    "convert_checkpoint",
    "from_pretrained",
    "load_checkpoint",
    "load_weights",
    "read_detector",
    "save_checkpoint",
    "to_official_state_dict",
]
