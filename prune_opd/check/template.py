"""Whether both models would have prompts in the same form: the student's template makes them, the teacher reads on."""

from __future__ import annotations

from pathlib import Path

from prune_opd.config import DataConfig
from prune_opd.data.chat_template import chat_template, render

SWITCH = "enable_thinking"
QUESTION = "What is 2 + 3?"
SHOWN = 60  # characters of a rendered prompt


def template_notes(student: Path, teacher: Path, data: DataConfig) -> list[str]:
    """What follows from a teacher with another chat template or thinking mode than the student, a sentence each."""
    ours, theirs = chat_template(student), chat_template(teacher)
    if ours == theirs:
        return []
    who = f"teacher = {str(teacher)!r}"
    if ours is None or theirs is None:
        has, lacks, form = (
            ("student", "teacher", "the student's template") if ours else ("teacher", "student", "no template")
        )
        return [
            f"{who}: the {has} has a chat template and the {lacks} has none: prompts are made with {form}, a form that "
            "the teacher was not trained on, so it may find good responses unlikely; choose a pair with one template"
        ]
    notes = []
    rendered = [rendered_prompt(path, text, data) for path, text in ((student, ours), (teacher, theirs))]
    if data.thinking is not None and SWITCH in ours and SWITCH not in theirs:
        notes.append(
            f"{who}: its chat template has no thinking switch and data.thinking = {str(data.thinking).lower()} sets "
            "the student's: the teacher scores responses of a mode that it may not know; choose a teacher of that mode"
        )
    mine, other = rendered
    if mine is None or mine != other:
        shown = "" if mine is None or other is None else f" (a prompt is {_parts(mine, other)})"
        notes.append(
            f"{who} has another chat template than the student{shown}: the teacher scores the student's form, which it "
            "was not trained on, and may find good responses unlikely; choose a pair with one template, or look at "
            "teacher_logp of the first steps"
        )
    return notes


def rendered_prompt(directory: Path, template: str, data: DataConfig) -> str | None:
    """A question as this template gives it to the model, with the run's settings; None if it does not render here."""
    turns = [{"role": "user", "content": QUESTION + data.suffix}]
    if data.system_prompt is not None:
        turns.insert(0, {"role": "system", "content": data.system_prompt})
    options = {} if data.thinking is None else {SWITCH: data.thinking}
    return render(directory, template, turns, add_generation_prompt=True, **options)


def _parts(mine: str, other: str) -> str:
    """Where two rendered prompts come apart, in few words."""
    first = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    first = max(first - 10, 0)
    ours, theirs = (repr(text[first : first + SHOWN]) for text in (mine, other))
    return f"…{ours} for the student and …{theirs} for the teacher"
