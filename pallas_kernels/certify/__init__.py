"""Certification on first use: is a backend right on this machine, and which right one is the fastest?

`certify` checks backends in a process of its own and stores verdicts in the user's cache; `verdicts.best` chooses by
them. Nothing here knows models: requests say what will run.

    machine     what verdicts depend on, found without using a GPU
    verdicts    the file of verdicts, and the choice
    cases       inputs on which a backend must be right
    examine     one verdict: compiled, compared, repeated, timed
    __main__    the process that examines
    parent      the process that starts it, waits, and stores what it reports
"""

from pallas_kernels.certify.parent import certify, check_settings
from pallas_kernels.certify.verdicts import Verdict, key_of, report

__all__ = ["Verdict", "certify", "check_settings", "key_of", "report"]
