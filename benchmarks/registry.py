"""The studies: the command line and the pages know those that have a line here."""

from __future__ import annotations

from typing import Any

from benchmarks.studies import (
    against,
    compat,
    dora,
    experts,
    growth,
    instructions,
    layer,
    mixtures,
    paper,
    peft,
    replicas,
    step,
    store,
    vllm,
)
from benchmarks.studies.grid import command as grid
from benchmarks.study import Study

DEFAULT = grid.STUDY
STUDIES: dict[str, Study[Any]] = {
    study.name: study
    for study in (
        grid.STUDY,
        growth.STUDY,
        layer.STUDY,
        compat.STUDY,
        peft.STUDY,
        paper.STUDY,
        instructions.STUDY,
        mixtures.STUDY,
        dora.STUDY,
        experts.STUDY,
        step.STUDY,
        replicas.STUDY,
        vllm.STUDY,
        store.STUDY,
        against.STUDY,
    )
}
