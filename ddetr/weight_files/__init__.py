"""Files of weights, of any project and of any part of a detector.

files.py          bytes to tensors, without running what a file contains
pickled.py        a pickle read without running it
architectures.py  which network names of tensors belong to, where it is none of ours
signatures.py     what a file is that holds no weights
folders.py        a folder, or weights in several files
state_dicts.py    where in a file its tensors lie
architectures.py  which other network a file is of
sources.py        a name, a hub id, an address or a path -> weights on this machine
catalogue.py      what each name stands for, with catalogue.json
hub.py            repositories of the Hugging Face hub, down and up [huggingface_hub]
download.py       files of https addresses
"""
