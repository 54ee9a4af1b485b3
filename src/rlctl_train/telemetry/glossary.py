"""Every metric, once: its name, meaning and unit. docs/metrics.md is made from this table.

In a name, `<x>` stands for anything without a slash and `{a,b}` for one of the words; `warm_start/` may
precede any name in a tracker.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Meaning:
    """What a metric name pattern stands for."""

    name: str
    unit: str
    text: str


SPREAD = "{mean,max,min}"

GLOSSARY = (
    Meaning("actor/pg_loss", "-", "Policy-gradient part of the loss, aggregated by `algo.aggregation`."),
    Meaning("actor/pg_clipfrac", "ratio", "Share of response tokens that the policy loss clipped or left out."),
    Meaning(
        "actor/pg_clipfrac_lower", "ratio", "Share of response tokens held by the loss's `dual_clip` or `max_ratio`."
    ),
    Meaning("actor/pg_covfrac", "ratio", "Share of response tokens chosen by `algo.loss` for their covariance."),
    Meaning("actor/ppo_kl", "nats", "Mean over response tokens of old minus current log-probability."),
    Meaning("actor/pair_margin", "nats", "How much likelier than by the reference chosen responses are than rejected."),
    Meaning("actor/pair_right", "ratio", "Share of response tokens in pairs of a margin above 0."),
    Meaning("actor/pair_tied", "ratio", "Share of response tokens in pairs of equal scores, which are left out."),
    Meaning("actor/kl_loss", "nats", "KL to the reference model in the loss, before its coefficient."),
    Meaning("actor/lm_loss", "nats", "Mean negative log-likelihood of right responses' tokens, before `algo.lm_coef`."),
    Meaning("actor/teacher_kl", "nats", "KL from the teacher over its likeliest tokens, before `algo.coef`."),
    Meaning("actor/teacher_mass", "ratio", "Mean probability that the teacher gives to those tokens together."),
    Meaning(
        "teacher/reverse_kl", "nats", "Mean of the policy's less the teacher's log-probability of a response token."
    ),
    Meaning("actor/entropy", "nats", "Mean entropy of the policy over response tokens."),
    Meaning(
        "actor/entropy_coef", "-", "Factor on the entropy bonus in this step, where `algo.entropy_control` moves it."
    ),
    Meaning("actor/reward_kl_penalty", "nats", "Mean KL per sequence that was taken off the reward."),
    Meaning("actor/reward_kl_penalty_coeff", "-", "Coefficient of the KL penalty in the reward."),
    Meaning("actor/grad_norm", "-", "Global L2 norm of the policy's gradient before clipping."),
    Meaning("actor/skipped", "ratio", "Share of optimizer steps left out because the gradient was not finite."),
    Meaning("actor/lr", "-", "Learning rate of the policy."),
    Meaning(f"critic/score/{SPREAD}", "score", "Score of a response, as the reward function gave it."),
    Meaning(f"critic/rewards/{SPREAD}", "score", "Reward of a response, KL penalty included, summed over its tokens."),
    Meaning(f"critic/advantages/{SPREAD}", "-", "Advantage of a response token."),
    Meaning(f"critic/returns/{SPREAD}", "score", "Return of a response token."),
    Meaning(f"critic/values/{SPREAD}", "score", "Value of a response token, from the critic."),
    Meaning("critic/vf_explained_var", "ratio", "1 - var(return - value) / var(return) over response tokens."),
    Meaning("critic/vf_loss", "-", "Loss of the critic."),
    Meaning("critic/vf_clipfrac", "ratio", "Share of response tokens whose value loss was clipped."),
    Meaning("critic/vpred_mean", "score", "Mean value over response tokens during the critic's update."),
    Meaning("critic/grad_norm", "-", "Global L2 norm of the critic's gradient before clipping."),
    Meaning("critic/skipped", "ratio", "Share of the critic's optimizer steps left out, likewise."),
    Meaning("critic/lr", "-", "Learning rate of the critic."),
    Meaning("reward_model/loss", "nats", "Cross-entropy of right and wrong against the reward model's sum."),
    Meaning("reward_model/accuracy", "ratio", "Share of responses that the reward model tells right from wrong."),
    Meaning("reward_model/grad_norm", "-", "Global L2 norm of the reward model's gradient before clipping."),
    Meaning("reward_model/skipped", "ratio", "Share of the reward model's optimizer steps left out, likewise."),
    Meaning("reward_model/lr", "-", "Learning rate of the reward model."),
    Meaning(f"response_length/{SPREAD}", "tokens", "Length of a response."),
    Meaning("response_length/clip_ratio", "ratio", "Share of responses that ended at `rollout.max_response_tokens`."),
    Meaning(f"prompt_length/{SPREAD}", "tokens", "Length of a prompt."),
    Meaning("timing_s/step", "s", "Wall time of the whole step."),
    Meaning("timing_s/gen", "s", "Generating responses."),
    Meaning("timing_s/reward", "s", "Scoring responses."),
    Meaning("timing_s/old_log_prob", "s", "The trainer's log-probabilities of the sampled tokens."),
    Meaning("timing_s/ref", "s", "The reference model's log-probabilities."),
    Meaning("timing_s/teacher", "s", "The teacher's log-probabilities."),
    Meaning("timing_s/values", "s", "The critic's values."),
    Meaning("timing_s/reward_model", "s", "The reward model's log-probabilities."),
    Meaning("timing_s/update_reward_model", "s", "Training the reward model."),
    Meaning("timing_s/adv", "s", "Advantages and returns."),
    Meaning("timing_s/update_critic", "s", "Training the critic."),
    Meaning("timing_s/update_actor", "s", "Training the policy."),
    Meaning("timing_s/update_weights", "s", "Moving the new weights to the rollout engines."),
    Meaning("timing_s/refresh_reference", "s", "Making the policy the reference."),
    Meaning("timing_s/testing", "s", "Validation."),
    Meaning("timing_s/save_checkpoint", "s", "Pause of training for a checkpoint, a wait for the one before included."),
    Meaning("timing_s/write_checkpoint", "s", "Writing a checkpoint beside training, until it is complete."),
    Meaning("perf/throughput", "tokens/s/device", "Prompt and response tokens per second of the step and device."),
    Meaning("perf/total_num_tokens", "tokens", "Prompt and response tokens of the step."),
    Meaning("perf/response_tokens", "tokens", "Response tokens of the step."),
    Meaning("perf/tail_share", "ratio", "Share of generation in which at most the last 5 % of responses go on."),
    Meaning(
        "perf/tflops/<phase>", "TFLOP/s/device", "Rate at which a phase does the model's own work (docs/profiling.md)."
    ),
    Meaning("perf/mfu/<phase>", "ratio", "That rate over the device's peak, where the catalogue knows the peak."),
    Meaning(
        "perf/object_store_gib",
        "GiB",
        "Most in use of all Ray object stores since the last step, asked each second.",
    ),
    Meaning("perf/time_per_step", "s", "Wall time of the whole step."),
    Meaning(
        "busy/<role>",
        "ratio",
        "Share of the time since the last step's end that a role was at work, mean of its ranks.",
    ),
    Meaning(
        "device_busy/<role>",
        "ratio",
        "Share of that time in which its devices computed: on CPU processor time over threads, else by the driver.",
    ),
    Meaning("memory_gib/<phase>", "GiB", "Memory of the fullest device in a phase; on CPU of the host, by this run."),
    Meaning("perf/max_memory_allocated_gb", "GiB", "Most that torch had handed out on a device in the step."),
    Meaning("health/logprob_gap", "nats", "Largest difference between sampled and recomputed log-probabilities."),
    Meaning("health/logprob_gap_mean", "nats", "Mean difference between sampled and recomputed log-probabilities."),
    Meaning("health/remote_save_failures", "count", "Checkpoints of this job that `checkpoint.remote` did not take."),
    Meaning("health/restarts", "count", "Times that this job has replaced lost workers so far."),
    Meaning("training/rollout_probs_diff_{mean,max,std}", "ratio", "Gap of sampled and recomputed probabilities."),
    Meaning("training/rollout_actor_probs_pearson_corr", "ratio", "Correlation of the two probabilities (Pearson)."),
    Meaning("rollout_corr/kl", "nats", "Mean over response tokens of rollout less trainer log-probability."),
    Meaning("rollout_corr/k3_kl", "nats", "KL of the rollout from the trainer per token, by the k3 estimate."),
    Meaning("rollout_corr/training_ppl", "-", "Perplexity of a response to the trainer, mean over responses."),
    Meaning("rollout_corr/rollout_ppl", "-", "Perplexity of a response to the rollout engine, mean over responses."),
    Meaning("rollout_corr/log_ppl_diff", "nats", "Trainer's less rollout's log-perplexity, mean over responses."),
    Meaning("rollout_corr/log_ppl_abs_diff", "nats", "Size of that difference, mean over responses."),
    Meaning("rollout_corr/log_ppl_diff_{max,min}", "nats", "Largest and smallest such difference of a response."),
    Meaning("rollout_corr/ppl_ratio", "ratio", "Trainer's over rollout's perplexity, mean over responses."),
    Meaning("rollout_corr/chi2_token", "-", "Mean squared token ratio (trainer over rollout) less 1."),
    Meaning("rollout_corr/chi2_seq", "-", "Mean squared ratio of whole responses less 1."),
    Meaning(
        "rollout_corr/rollout_is_{mean,std,min,max}",
        "ratio",
        "Bounded weight of a response token, before it is normalised; without `algo.correction.weights`, that of TIS.",
    ),
    Meaning("rollout_corr/rollout_is_eff_sample_size", "ratio", "1 / mean((w / mean w)^2) of those weights."),
    Meaning(
        "rollout_corr/rollout_is_ratio_fraction_{high,low}",
        "ratio",
        "Share of response tokens of a ratio beyond the weights' bounds; without a lower one, below 1 / upper.",
    ),
    Meaning("rollout_corr/rollout_rs_masked_fraction", "ratio", "Share of response tokens left out of the update."),
    Meaning("rollout_corr/rollout_rs_seq_masked_fraction", "ratio", "Share of responses with a token left out."),
    Meaning("rollout_corr/rollout_rs_<rule>_masked_fraction", "ratio", "Share of response tokens one rule leaves out."),
    Meaning("rollout_corr/rollout_rs_<rule>_seq_masked_fraction", "ratio", "Share of responses it takes a token from."),
    Meaning("rollout_corr/rollout_is_veto_fraction", "ratio", "Share of responses vetoed by `algo.correction.veto`."),
    Meaning("rollout_corr/rollout_is_catastrophic_token_fraction", "ratio", "Share of response tokens that veto."),
    Meaning("reward/errors", "responses", "Responses whose grader failed, crashed or ran out of time; they score 0."),
    Meaning("reward/overlong_penalty", "score", "Mean over responses of what `algo.overlong_penalty` took off."),
    Meaning("reward/greedy_baseline", "score", "Mean score of the greedy responses that ReMax compares with."),
    Meaning("sampling/distinct_share", "ratio", "Share of responses learnt from at least once (`algo.resample`)."),
    Meaning("sampling/rounds", "-", "Rounds of generation of the step (dynamic sampling)."),
    Meaning(
        "sampling/kept_groups", "groups", "Groups that teach (unequal scores, accuracy in bounds) and are learnt from."
    ),
    Meaning("sampling/dropped_groups", "groups", "Groups left out because they do not teach."),
    Meaning("sampling/filled_groups", "groups", "Groups that do not teach but fill a step up after the last round."),
    Meaning("sampling/surplus_groups", "groups", "Groups that teach, beyond the batch, which are given up."),
    Meaning("sampling/score_mean", "score", "Mean score of every response generated, also of groups left out."),
    Meaning("reward/<part>", "score", "Mean of one part of a reward of several parts."),
    Meaning("val-core/<source>/acc/mean@<n>", "ratio", "Accuracy on held-out prompts, mean of n responses a prompt."),
    Meaning("val/accuracy", "ratio", "Accuracy on held-out prompts over all sources."),
    Meaning("val/score", "score", "Mean score of responses to held-out prompts."),
    Meaning("train/loss", "nats", "Cross-entropy per completion token of the supervised batch."),
    Meaning("val/loss", "nats", "Cross-entropy per completion token on held-out rows."),
)


def describe(name: str) -> Meaning:
    """Return the meaning of a metric; a name nobody has written down is a KeyError."""
    bare = name.removeprefix("warm_start/")
    for entry in GLOSSARY:
        if _regex(entry.name).fullmatch(bare):
            return entry
    raise KeyError(f"{name} is not in rlctl_train.telemetry.glossary: add its meaning and unit there")


def markdown() -> str:
    """Return the glossary as one Markdown table."""
    rows = [f"| `{entry.name}` | {entry.unit} | {entry.text} |" for entry in GLOSSARY]
    return "\n".join(["| metric | unit | meaning |", "|---|---|---|", *rows]) + "\n"


@cache
def _regex(name: str) -> re.Pattern[str]:
    text = re.escape(name)
    text = re.sub(r"<\w+>", "[^/]+", text)
    text = re.sub(r"\\\{([\w,]+)\\\}", lambda match: f"(?:{match[1].replace(',', '|')})", text)
    return re.compile(text)
