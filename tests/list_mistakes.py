"""More of `mistakes`: lists of tables, as [[teacher]] and [[data]], and a hub out of reach."""

from __future__ import annotations

from pathlib import Path

from mistakes import TABLE, Mistake, Options, given
from tiny_world import World, make_model

TEACHERS = "[{{name='a', hf_path='{world}/teacher'}}, {{name='b', hf_path='{world}/student'}}]"
SETS = "[{{name='x', teacher='a'}}, {{name='y', teacher='b'}}]"
VALIDATION = "[{{name='v', teacher='a'}}]"


def several(
    models: str = TEACHERS,
    sets: str = SETS,
    validation: str = VALIDATION,
    more: tuple[str, ...] = (),
) -> Mistake:
    options = ("--teacher.hf_path=", "--teacher.models", models, "--data.sets", sets)
    return given(*options, "--validation.sets", validation, *more)


def other_vocabulary(world: World, folder: Path) -> Options:
    make_model(folder / "other", seed=3, extra=("\t",))
    models = TEACHERS.replace("{world}/student", str(folder / "other"))
    return several(models)(world, folder)


TABLE |= {
    "[teacher] and several": (
        given("--teacher.models", TEACHERS, "--data.sets", SETS),
        ["[teacher] hf_path: ", "contradicts [[teacher.models]]; wanted one or the other"],
    ),
    "a teacher without a name": (
        several(TEACHERS.replace("'b'", "''")),
        ['teacher.models[1].name: "" is not a name; wanted letters, digits'],
    ),
    "two teachers of one name": (
        several(TEACHERS.replace("'b'", "'a'")),
        ['teacher.models[1].name: "a" is the name of another one too'],
    ),
    "a teacher without a folder": (
        several("[{{name='a'}}]", "[{{name='x'}}]"),
        ["teacher.models[0].hf_path: required; give a local Hugging Face folder or a hub id"],
    ),
    "a teacher that is not there": (
        several(TEACHERS.replace("/student", "/no")),
        ["teacher.b.hf_path = ", "/no'"],
    ),
    "a teacher of another vocabulary": (
        other_vocabulary,
        ["student.hf_path and teacher.b.hf_path: the vocabularies differ"],
    ),
    "a teacher of no set": (
        several(sets="[{{name='x', teacher='a'}}]"),
        ['teacher.models[1].name: no [[data.sets]] has teacher = "b"'],
    ),
    "a set of no teacher": (
        several(sets="[{{name='x', teacher='a'}}, {{name='y'}}]"),
        ["data.sets[1].teacher: required with several [[teacher.models]]", "wanted a or b"],
    ),
    "a set of an unknown teacher": (
        several(sets="[{{name='x', teacher='a'}}, {{name='y', teacher='c'}}]"),
        ['data.sets[1].teacher: "c" is not the name of a teacher; wanted one of a, b'],
    ),
    "a set of a teacher where there is one": (
        given("--data.sets", "[{{name='x', teacher='a'}}]"),
        ['data.sets[0].teacher: "a" is not the name of a teacher; wanted [[teacher.models]] of'],
    ),
    "a set to validate on of no teacher": (
        several(validation="[{{name='v'}}]"),
        ["validation.sets[0].teacher: required with several", "wanted a or b"],
    ),
    "several teachers, one validation": (
        several(validation="[]", more=("--validation.path", "{world}/data")),
        ["[validation] sets: required with several [[teacher.models]]", "wanted a or b"],
    ),
    "a set without a share": (
        several(sets="[{{name='x', teacher='a', weight=0}}]"),
        ["--data.sets[0].weight: 0.0 is out of range; wanted a number > 0"],
    ),
    "a set too small for its share": (
        several(
            sets=SETS.replace("'b'", "'b', split='test', weight=100"),
            more=("--rollout.prompts_per_step", "20"),
        ),
        ["data.sets[1].weight: 100.0 of 101 is 19.8 of [rollout] prompts_per_step = 20, but"],
    ),
    "a set that is not there": (
        several(sets=SETS.replace("'b'", "'b', path='{new}/no.jsonl'")),
        ["data.sets[1].path = ", "no.jsonl", "does not exist"],
    ),
    "several sets by epochs": (
        several(more=("--training.epochs", "1")),
        ["[training] epochs: 1 contradicts several [[data.sets]]", "and [training] steps"],
    ),
    "a key of the table in its row": (
        several(sets="[{{name='x', template='raw'}}]"),
        ["--data.sets[0].template: unknown key; it is one of [data], for all of its rows alike"],
    ),
    "a validation set that is not there": (
        given("--validation.sets", "[{{name='a'}}, {{name='b', path='{new}/no.jsonl'}}]"),
        ["validation.sets[1].path = ", "no.jsonl", "does not exist"],
    ),
    "no hub": (
        given("--student.hf_path", "org/name"),
        ["student.hf_path = 'org/name' is no local folder and the hub gives no such model"],
    ),
    "no hub for data": (
        given("--data.path", "org/name"),
        ['data.path: "org/name" is no local path', "give a downloaded copy's folder"],
    ),
}  # fmt: skip
