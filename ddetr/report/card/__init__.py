"""A run for those who find it on the hub. Nothing in it names a place of this machine.

release.py      the folder that is published: weights, configuration, model card, curves
model_card.py   README.md, written from the run
public.py       what of settings and command lines may leave the machine
"""
