"""Findings and impression out of a radiology report as radiologists write it. Knows text, no files."""

import re

FINDINGS = ("FINDINGS", "FINDING")
IMPRESSION = ("IMPRESSION", "IMPRESSIONS", "CONCLUSION", "CONCLUSIONS", "OPINION")
_BOTH = tuple(
    f"{one}{joined}{other}"
    for one, other in (("FINDINGS", "IMPRESSION"), ("IMPRESSION", "FINDINGS"), ("FINDING", "IMPRESSION"))
    for joined in ("/", " / ", " AND ", " & ", ", ")
)
_PREAMBLE = """FINAL REPORT|WET READ|REPORT|EXAMINATION|EXAMINATIONS|EXAM|EXAM TYPE|TYPE OF EXAM|TYPE OF EXAMINATION
STUDY|INDICATION|INDICATIONS|CLINICAL INDICATION|CLINICAL HISTORY|CLINICAL INFORMATION|HISTORY|PATIENT HISTORY|REASON
DATE|REASON FOR EXAM|REASON FOR EXAMINATION|REASON FOR STUDY|TECHNIQUE|PROCEDURE|COMPARISON|COMPARISONS|COMPARISON STUDY
VIEW|VIEWS|CHEST|CHEST RADIOGRAPH|PORTABLE CHEST|REFERENCE EXAM|PRIOR STUDY"""
_CLOSING = "RECOMMENDATION|RECOMMENDATIONS|NOTIFICATION|ADDENDUM|ATTESTATION|DICTATED BY|SIGNED"
_KNOWN = {*FINDINGS, *IMPRESSION, *_BOTH, *re.split(r"[|\n]", _PREAMBLE), *_CLOSING.split("|")}
_HEADING = re.compile(r"^[ \t]*([A-Za-z][A-Za-z ,/&()-]{2,60}?)[ \t]*:", re.MULTILINE)
_TITLE = re.compile(r"^\s*FINAL REPORT\s*$", re.MULTILINE)
_PARAGRAPHS = re.compile(r"\n[ \t]*\n")


def report_sections(report: str) -> dict[str, str]:
    """Text of each section by its heading in capitals, white space evened out.

    A heading is a line's start that ends in a colon and is known, in capitals or not. Others (LUNGS:, HEART:) are part
    of the section that they stand in.
    """
    return {name: " ".join(text.split()) for name, text in _sections(report).items()}


def report_text(report: str) -> str:
    """Findings and impression in one text; without such a heading what stands behind the last preamble; "" if nothing.

    A preamble (INDICATION:, TECHNIQUE:, ...) ends with its paragraph.
    """
    sections = _sections(report)
    wanted = (*FINDINGS, *_BOTH, *IMPRESSION)
    text = " ".join(sections[name] for name in wanted if name in sections)
    if not any(name in sections for name in wanted):
        last = next(reversed(sections), None)
        whole = sections[last] if last is not None else _TITLE.sub("", report)
        text = "\n".join(_PARAGRAPHS.split(whole)[1:]) if last is not None else whole
    return " ".join(text.split())


def _sections(report: str) -> dict[str, str]:
    headings = [match for match in _HEADING.finditer(report) if " ".join(match[1].upper().split()) in _KNOWN]
    ends = [heading.start() for heading in headings[1:]] + [len(report)]
    sections: dict[str, str] = {}
    for heading, end in zip(headings, ends, strict=False):
        name, text = " ".join(heading[1].upper().split()), report[heading.end() : end]
        sections[name] = f"{sections[name]}\n{text}" if name in sections else text
    return sections
