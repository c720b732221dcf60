"""Does this machine's GPU truly work? `ddetr doctor`. Imports no PyTorch: where that is missing or broken, it says so.

facts.py            what is known of a machine, as plain data
machine.py, driver.py, pytorch.py, trial.py, all_reduce.py
                    gather the facts; the last four in child processes (children.py), which may crash or hang
check_*.py          pure functions from facts to rows (rows.py)
cures.py            what is to be done, where that depends on the container
causes.py           why a machine is not fit, and the exit code of each cause
versions.py         the published versions that it is held against (versions.json)
diagnosis.py        the whole examination
rendering.py        the table
"""
