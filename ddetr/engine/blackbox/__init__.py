"""A training step that fails: skipped, explained, recorded, computed again.

guard.py    bad steps are skipped, failed ones recorded
trace.py    where a step stops being finite
bundle.py   what is kept of a step that failed
reading.py  a bundle read back, and nothing in it believed
replay.py   a recorded step computed again
"""
