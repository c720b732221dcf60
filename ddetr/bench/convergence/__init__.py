"""`ddetr bench convergence`: how soon detectors learn, side by side on the same images.

command.py      the comparison: which sides train, on what, for how long, and where it goes on
sides.py        the sides as data: ours are options over one base, the others are networks of other people
ours.py         a side of ours, by `ddetr train`
peer.py         what a network of other people is here
peers.py        their training, with our loader, schedule and evaluation
detr.py         DETR and DETR-DC5: transformers' network and loss
faster_rcnn.py  Faster R-CNN with a feature pyramid: torchvision's
plan.py         what an output folder compares, so that it goes on with nothing else
points.py       the AP of a side and a seed after each epoch, in a file
summary.py      when a side reaches an AP; means and spreads over seeds
tables.py       the figures for people
curves.py       the curves as a picture
"""
