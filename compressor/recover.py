"""The plan of a run becomes its student: which of the best plans, reconstructed and trained as the recipe wants it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compressor.errors import DataError
from compressor.executor import Reference
from compressor.network import Network, loaded
from compressor.plan import Plan
from compressor.recovery import distill, on_policy, reinforce
from compressor.recovery.cache import TeacherCache
from compressor.recovery.distill import visited
from compressor.recovery.reconstruct import reconstruct
from compressor.recovery.reward import Judge
from compressor.recovery.rollouts import Writer
from compressor.recovery.trained import LEARNING_RATES
from compressor.run import Run
from compressor.search import finalists
from compressor.stages import key_of
from compressor.student import Student
from compressor.text import load_prompts, prompts_of, tokens_digest


@dataclass(frozen=True)
class Finalist:
    """A plan of the search; its KL there, and on held-out text after a short recovery (nats per token), if it had one."""

    plan: Plan
    kl: float
    recovered_kl: float | None = None


def choose(run: Run, kls: dict[Plan, float]) -> list[Finalist]:
    """The plans that came into question, the student's first: ranks change in recovery, so it is tried, if the recipe asks
    for more than one. kls: of the search, the best first."""
    vars(run).pop("executor", None)  # its copy of the teacher makes room for the training
    wanted = run.recipe.distill
    plans = finalists(kls, wanted.compared)
    if len(plans) < 2:
        return [Finalist(plans[0], kls[plans[0]])]
    found = [
        Finalist(plan, kls[plan], recover(run, plan, min(wanted.finalist_steps, wanted.steps), f"finalist-{number}").kl)
        for number, plan in enumerate(plans, 1)
    ]
    return sorted(found, key=lambda finalist: finalist.recovered_kl or 0.0)


@dataclass(frozen=True)
class Recovery:
    """A plan's student after its recovery, and the KL on held-out text (nats per token) of its variants as they come from the
    bank, after reconstruction, and along the training; None where there was none."""

    student: Student
    kl_before: float | None
    kl_reconstructed: float | None
    curve: distill.Curve | None

    @property
    def kl(self) -> float | None:
        """Of the student."""
        if self.curve:
            return self.curve.kl
        return min((kl for kl in (self.kl_before, self.kl_reconstructed) if kl is not None), default=None)


def recover(run: Run, plan: Plan, steps: int, name: str = "distill") -> Recovery:
    """Reconstruct a plan's student and train it, as far as the recipe wants it; name: of the training as a stage."""
    wanted, decoder = run.recipe.distill, run.teacher.network.decoder
    fitted_NL, trained_NL, held_out_NL = run.texts.fitted_NL, run.texts.trained_NL, run.texts.held_out_NL
    made_of = [run.bank.key, plan.digest, tokens_digest(fitted_NL), tokens_digest(held_out_NL)]

    def rebuild(report_progress) -> list[float]:
        students = [run.bank.realize(plan), reconstruct(run.bank, plan, fitted_NL, report_progress)]
        held_out = Reference(run.teacher.network, held_out_NL)
        return [held_out.kl(loaded(run.teacher.network, student)) for student in students]

    student, before, rebuilt = run.bank.realize(plan), None, None
    if wanted.reconstruct:
        stage = f"reconstruct-{plan.digest[:6]}"  # a finalist that becomes the student has it already
        before, rebuilt = run.stages.value(stage, key_of(*made_of), rebuild)
        if rebuilt < before:
            student = reconstruct(run.bank, plan, fitted_NL)
    if not steps:
        return Recovery(student, before, rebuilt, None)
    settings = distill.Settings(
        steps=steps,
        train=wanted.train,
        learning_rate=wanted.learning_rate or LEARNING_RATES[wanted.train],
        warmup=wanted.warmup,
        seed=wanted.seed,
        precision=wanted.precision,
        checkpointing=wanted.gradient_checkpointing,
    )
    aim = wanted.model_dump(exclude={"tokens", "finalists", "finalist_steps", "steps"})
    prompts = _prompts(run) if wanted.own_text else ([], [])
    asked = [prompt_P.tolist() for some in prompts for prompt_P in some]
    cache = _teacher_cache(run, steps)
    key = key_of(*made_of, tokens_digest(trained_NL), settings.to_dict(), aim, run.recipe.batch_windows, asked)

    def train(report_progress) -> tuple[Student, dict]:
        checkpoint = run.out / "stages" / f"distill-{key}.part"
        trained, curve = distill.distill(
            run.teacher.network,
            student,
            lambda network: _objective(run, network, cache, *prompts),
            held_out_NL,
            settings,
            checkpoint,
            report_progress,
        )
        return trained, curve.to_dict()

    student, told = run.stages.student(name, key, decoder, train)
    curve = distill.Curve.from_dict(told)
    return Recovery(student, curve.held_out[0][1]["kl"] if before is None else before, rebuilt, curve)


def _teacher_cache(run: Run, steps: int) -> TeacherCache | None:
    """What `distill.top_k` asks for: of all windows that a training of so many steps visits, or the recipe's, which is longer
    than a finalist's."""
    wanted, trained_NL = run.recipe.distill, run.texts.trained_NL
    if not wanted.top_k:
        return None
    visits = max(steps, wanted.steps) * run.recipe.batch_windows
    windows = {visited(len(trained_NL), n, wanted.seed) for n in range(min(visits, len(trained_NL)))}
    folder = run.out / "stages" / "teacher-cache"
    cache = TeacherCache(folder, run.bank.key, trained_NL, sorted(windows), wanted.top_k, wanted.temperature)
    with run.stages.timed("teacher-cache", cache.key) as report_progress:
        cache.make(run.teacher.network, run.recipe.micro_batch_windows, report_progress)
    return cache


def _objective(
    run: Run, network: Network, cache: TeacherCache | None, prompts: list[Tensor], held_out: list[Tensor]
) -> distill.Objective:
    """What `distill.method` aims at."""
    wanted, teacher = run.recipe.distill, run.teacher.network
    writer = Writer(teacher, network, prompts, held_out, wanted.rollouts.new_tokens, teacher.ends(), wanted.seed)
    if wanted.method == "rl":
        rl = wanted.rl
        settings = reinforce.Settings(wanted.rows // rl.group, rl.group, rl.clip, rl.epochs, rl.leash, rl.target_kl)
        return reinforce.Reinforce(writer, Judge(run.teacher, rl.rewards, run.rewards), settings)
    text = distill.Imitation(
        teacher,
        network,
        run.texts.trained_NL,
        windows=run.recipe.batch_windows,
        together=run.recipe.micro_batch_windows,
        kl_weight=wanted.kl_weight,
        hidden_weight=wanted.hidden_weight,
        attention_weight=wanted.attention_weight,
        temperature=wanted.temperature,
        seed=wanted.seed,
        cache=cache,
    )
    if wanted.method == "kd":
        return text
    own = on_policy.Settings(wanted.rows, wanted.on_policy.share, wanted.on_policy.discount)
    return on_policy.OnPolicy(writer, text, own)


def _prompts(run: Run) -> tuple[list[Tensor], list[Tensor]]:
    """(prompts of the training, held-out prompts), token ids [P] each.

    Raises:
        DataError: there are too few.
    """
    wanted = run.recipe.distill.rollouts
    if wanted.prompts:
        every = load_prompts(wanted.prompts, run.teacher.tokenizer, wanted.prompt_tokens)
        if len(every) <= wanted.held_out:
            raise DataError(
                f"{wanted.prompts}: expected more than distill.rollouts.held_out = {wanted.held_out} prompts, "
                f"found {len(every)}; give more, or lower it"
            )
        return every[wanted.held_out :], every[: wanted.held_out]
    length = wanted.prompt_tokens, wanted.new_tokens
    held_out = prompts_of(run.texts.held_out_NL, *length)
    spread = held_out[:: max(1, len(held_out) // wanted.held_out)]
    return prompts_of(run.texts.trained_NL, *length), spread[: wanted.held_out]
