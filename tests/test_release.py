"""What a release leans on says the same everywhere, in the form that others read it by."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from a3tune import __version__

ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_changelog_has_this_version_and_one_that_is_not_released_at_most():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    found = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+) \((unreleased|\d{4}-\d\d-\d\d)\)", heading) for heading in headings]
    assert all(found), headings
    versions = [tuple(map(int, one.groups()[:3])) for one in found if one]
    assert versions == sorted(set(versions), reverse=True)
    assert any(heading.startswith(f"{__version__} (") for heading in headings)
    assert "unreleased" not in " ".join(headings[1:])


def test_the_citation_is_one_of_the_citation_file_format():
    """Its required fields, and types of values (https://citation-file-format.github.io, 1.2.0)."""
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["cff-version"], citation["type"], citation["version"]) == ("1.2.0", "software", __version__)
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors", "year"} <= paper.keys() and type(paper["year"]) is int
    for author in (*citation["authors"], *paper["authors"]):
        assert author.keys() in ({"name"}, {"family-names", "given-names"}), author
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_workflow_runs_what_a_checkout_does():
    workflow = read(".github/workflows/ci.yml")
    assert workflow.keys() == {"name", True, "permissions", "concurrency", "jobs"}  # YAML reads `on` as true
    steps = workflow["jobs"]["everything"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"] and os.access(ROOT / ".ci" / "run", os.X_OK)
    for step in steps:
        assert "run" in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]), step
    targets = re.findall(r"^make ([\w-]+)$", (ROOT / ".ci" / "run").read_text(), re.M)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert phony and {*phony[1].split()} - {*targets} == {"demo", "clean", "test-newest", "test-lowest"}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_an_issue_form_has_what_its_page_needs(form: Path):
    content = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= content.keys()
    for part in content["body"]:
        assert part["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert part["attributes"].get("value" if part["type"] == "markdown" else "label"), part
    assert any(part["type"] != "markdown" for part in content["body"])


def test_a_report_of_a_problem_asks_for_versions():
    assert [form.stem for form in FORMS] == ["bug", "idea"]
    asked = [part for part in yaml.safe_load(FORMS[0].read_text())["body"] if "a3tune env" in str(part["attributes"])]
    assert len(asked) == 1 and asked[0]["validations"]["required"]
