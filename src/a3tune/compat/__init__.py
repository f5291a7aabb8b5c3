"""Every private or unsettled name of transformers, PEFT and autograd that we use: a release that moves one breaks this
room, and `tests/test_compat.py` says which. Knows those libraries; nothing of ours.
"""
