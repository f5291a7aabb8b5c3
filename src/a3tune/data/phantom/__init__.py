"""Phantom scans: synthetic chest, abdomen and brain images with exact regions, and SLAKE-shaped questions on them."""

from a3tune.data.phantom.dataset import DEMO_PATIENTS, write_phantom
from a3tune.data.phantom.questions import Question, ask
from a3tune.data.phantom.scan import Lesion, Scan, make_scan

__all__ = ["DEMO_PATIENTS", "Lesion", "Question", "Scan", "ask", "make_scan", "write_phantom"]
