"""How often the gates are wrong, through the real scoreboard and verdict, on scores that are drawn.

The spreads are those of a finished run on the handbook: 100 recall questions of 80 sections (20 with two questions); the differences
tuned - base have a standard deviation of 0.234 on recall and of 0.094 on held-out questions, which general ones are taken to have;
q8_0 - tuned has 0.050. Questions of one section shared nothing measurable there; here a section effect of 0.12 makes up a quarter
of the variance, since other documentation may be less even.
"""


import numpy

from stages.evaluate import score_set
from stages.records import Score
from stages.scoreboard import Scoreboard
from stages.scoring import Sampling
from stages.verdict import Gates, judge

GATES = Gates(
    min_recall_gain=0.0,
    max_gguf_loss=0.03,
    max_general_loss=0.1,
    max_abstention_loss=0.1,
    max_champion_loss=0.05,
    min_questions=30,
)
SAMPLING = Sampling(confidence=0.95, resamples=1000, seed=1)
DRAWS = 500
SECTION, ITEM, OTHER, QUANT = 0.12, 0.2, 0.094, 0.05  # standard deviations of differences in similarity
MODELS = {"base": "b" * 64, "tuned": "7" * 64, "q8_0": "8" * 64}
FIGURES = {
    "validate": {"pairs": 700},
    "split": {"pairs": 700},
    "export": {"files": {"f": {"quant": "q8_0", "sha256": "8" * 64}}, "merged_sha256": "7" * 64, "chat_sha256": "c" * 64},
}


def answered(questions: str, sections: list[int], systems: dict[str, numpy.ndarray]) -> list[Score]:
    """A Score for each question and system; on out-of-scope questions the numbers say who abstained."""
    is_out = questions == "out_of_scope"
    return [
        Score(
            id=f"{system}{number}", question_id=f"{number}", set=questions, section_id=f"s{section}", type="factual", system=system,
            similarity=None if is_out else float(value), rouge_l=None, key_facts=None, evidence=None, judge=None,
            abstained=float(value) if is_out else 0.0, passed=float(value) if is_out else float(value >= 0.8),
        )
        for system, values in systems.items()
        for number, (section, value) in enumerate(zip(sections, values, strict=True))
    ]  # fmt: skip


def drawn_board(
    rng: numpy.random.Generator, gain: float = 0.0, general: float = 0.0, abstention: float = 0.0, spared: int = 60, twice: int = 20
) -> Scoreboard:
    """A scoreboard of systems whose true differences are given; `spared` sections have one recall question, `twice` have two."""
    sections = [*range(spared + twice), *range(spared, spared + twice)]
    base = rng.normal(0.557, 0.14, len(sections))
    shift = rng.normal(0, SECTION, spared + twice)[sections] + rng.normal(0, ITEM, len(sections))
    tuned = base + gain + shift
    known = rng.normal(0.5, 0.14, 20)
    silent = (rng.random(40) < 0.5).astype(float)
    sets = {
        "recall": answered("recall", sections, {"base": base, "tuned": tuned, "q8_0": tuned + rng.normal(0, QUANT, len(sections))}),
        "general": answered("general", list(range(20)), {"base": known, "tuned": known + general + rng.normal(0, OTHER, 20)}),
        "out_of_scope": answered(
            "out_of_scope", list(range(40)), {"base": silent, "tuned": silent * (rng.random(40) >= -2 * abstention)}
        ),
    }
    scored = {name: score_set(scores, set(), SAMPLING) for name, scores in sets.items()}
    return Scoreboard(SAMPLING.confidence, SAMPLING.seed, scored, MODELS, "d" * 64, "c" * 64, ())


def promoted(seed: int, **truth: float) -> tuple[float, float]:
    """The share of DRAWS that is promoted, and the mean of the minimum effects that their scoreboards state."""
    rng = numpy.random.default_rng(seed)
    boards = [drawn_board(rng, **truth) for _ in range(DRAWS)]
    effects = [board.sets["recall"].comparisons["tuned-base"].minimum_effect for board in boards]
    return sum(judge(board, "q8_0", GATES, FIGURES).outcome == "promote" for board in boards) / DRAWS, float(numpy.mean(effects))
