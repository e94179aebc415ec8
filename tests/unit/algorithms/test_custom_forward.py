"""IFT and CARFT on the custom-forward hook: the invariants of dossier sections 11(g) and 12(g), by
hand and against plain transformers.
"""

import numpy as np
import pytest
import torch

from tandem.algorithms.base import Batch
from tandem.algorithms.parts.objectives.embedding import Attraction, PairedForward, similarity
from tandem.algorithms.parts.objectives.propagated import PropagatedNLL
from tandem.algorithms.parts.objectives.tokens import Tokens
from tandem.algorithms.registry import configured, make_method
from tandem.algorithms.sft.ift import MixedForward
from tandem.engine.config.schema import Config, LearnerConfig, ModelConfig
from tandem.engine.core.types import Source, StepPlan
from tandem.engine.learner.by_hand import group, trajectory
from tandem.engine.learner.inspect import inspect
from tandem.engine.learner.local_engine import LocalEngine
from tandem.engine.learner.packing import pack
from tandem.engine.learner.rank import LearnerRank, build_policy
from tandem.engine.learner.terms import denominators
from tandem.launch.run.sides import policy_spec

EXPERTS = (trajectory([1, 2], [5, 6, 3], expert=True), trajectory([1], [7, 3], expert=True))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    from tandem.engine.model.tiny import make_tiny

    return str(make_tiny(tmp_path_factory.mktemp("model") / "tiny", hidden=32, layers=2))


def tokens(logp, segment=None, **more):
    logp = torch.tensor(logp, requires_grad=True)
    zeros = torch.zeros(len(logp), dtype=torch.long)
    return Tokens(
        logp=logp,
        segment=zeros if segment is None else torch.tensor(segment),
        group=zeros,
        source=zeros,
        streams=more,
    )


def ramp(row):
    return -0.1 * (1.0 + np.arange(len(row.tokens), dtype=np.float32))


def test_a_token_pays_for_what_follows():
    """ell = 1 2 4, gamma 1/2: sums 1 + 1 + 1, 2 + 2, 4, scaled to sum 3; the second row has one
    token and weight 1. Section 12(g): weights sum to T.
    """
    t = tokens([-1.0, -2.0, -4.0, -5.0], [0, 0, 0, 1])
    loss, _ = PropagatedNLL(0.5, detach=True)(t)
    np.testing.assert_allclose(
        loss.detach(), [3 * 3 / 11, 3 * 4 / 11 * 2, 3 * 4 / 11 * 4, 5.0], rtol=1e-6
    )
    loss.sum().backward()
    np.testing.assert_allclose(t.logp.grad, [-9 / 11, -12 / 11, -12 / 11, -1], rtol=1e-6)
    through = tokens([-1.0, -2.0, -4.0, -5.0], [0, 0, 0, 1])
    attached, _ = PropagatedNLL(0.5)(through)
    attached.sum().backward()
    assert torch.equal(attached, loss)
    e = np.array([1.0, 2.0, 4.0])

    def value(e):
        return 3 * (
            (e @ (raw := np.array([e[0] + e[1] / 2 + e[2] / 4, e[1] + e[2] / 2, e[2]]))) / raw.sum()
        )

    numeric = [(value(e + d) - value(e - d)) / 2e-5 for d in 1e-5 * np.eye(3)]
    np.testing.assert_allclose(-through.logp.grad[:3], numeric, rtol=1e-4)
    assert not np.allclose(through.logp.grad, t.logp.grad, atol=0.05)


def test_ift_without_mixing_and_propagation_is_sft_per_sequence():
    """Section 12(g)."""
    method, batch = make_method("ift", {"lam": 0.0, "gamma": 0.0}), Batch(0, (), EXPERTS)
    out = inspect(method, batch, ramp)
    assert method.forward is None and out.loss == pytest.approx(
        ((0.3 + 0.4 + 0.5) / 3 + (0.2 + 0.3) / 2) / 2
    )
    np.testing.assert_allclose(out.gradients[0], [0, 0, -1 / 6, -1 / 6, -1 / 6], rtol=1e-6)
    paper = inspect(make_method("ift", {"as": "paper"}), batch, ramp)
    assert paper.loss == pytest.approx((0.3 + 2 * 0.4 + 3 * 0.5 + 0.2 + 2 * 0.3) / 2, rel=1e-6)


def learner(model_path, method):
    config = Config(
        model=ModelConfig(path=model_path), learner=LearnerConfig(grad_clip=0.0), method=method
    )
    spec = policy_spec(configured(config.method))
    engine = LocalEngine(build_policy(config, model_path, spec), config.learner)
    return LearnerRank(config, model_path, spec, engine)


def run(rank, rows, terms, forward, budget=10_000):
    """{(row, position): stream values} of a forward over packed rows: logp and extra streams."""
    found = {}
    for micro in pack(rows, terms, 1, budget, version=0)[0]:
        with torch.no_grad():
            out = rank.run_micro_batch(rank.engine.forward, micro, 1.0, custom=forward)
        place = micro.positions.reshape(-1)[micro.index] + 1
        for i, (segment, t) in enumerate(zip(micro.segment, place, strict=True)):
            found[micro.rows[segment], int(t)] = {
                name: float(values[i]) for name, values in out.items()
            }
    return found


def test_mixed_contexts_are_those_of_plain_transformers(model_path):
    """Row by row with inputs_embeds made by hand, the prompt kept; and no neighbour in the pack
    matters.
    """
    from transformers import AutoModelForCausalLM

    rank, method = learner(model_path, {"name": "ift"}), make_method("ift", {})
    rng = np.random.default_rng(0)
    experts = tuple(
        trajectory(rng.integers(7, 100, 3), rng.integers(7, 100, n), expert=True) for n in (4, 9, 6)
    )
    rows, terms = method.rows(Batch(0, (), experts)), method.terms(Batch(0, (), experts))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    expected = {}
    for i, row in enumerate(rows):
        ids = torch.as_tensor(row.tokens, dtype=torch.long)[None]
        with torch.no_grad():
            guess = ids.clone()
            guess[0, 3:] = model(input_ids=ids).logits[0, 2:-1].argmax(-1)
            table = model.get_input_embeddings()
            logp = (
                model(inputs_embeds=0.8 * table(ids) + 0.2 * table(guess))
                .logits[0, :-1]
                .log_softmax(-1)
            )
        expected |= {(i, t): float(logp[t - 1, ids[0, t]]) for t in range(3, ids.shape[1])}
    for budget in (10_000, 14):
        found = run(rank, rows, terms, method.forward, budget)
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(
            [found[k]["logp"] for k in expected], list(expected.values()), atol=1e-5
        )
    assert any(abs(v["logp"] - v["gold_logp"]) > 1e-4 for v in found.values()), (
        "mixing changes something"
    )


def test_where_every_guess_is_right_nothing_is_mixed(model_path):
    """Section 12(g): the demonstration is the model's own greedy answer."""
    rank, method = learner(model_path, {"name": "ift"}), make_method("ift", {})
    ids = [11, 12, 13]
    for _ in range(6):
        with torch.no_grad():
            ids.append(
                int(rank.engine.module.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            )
    batch = Batch(0, (), (trajectory(ids[:3], ids[3:], expert=True),))
    for value in run(rank, method.rows(batch), method.terms(batch), MixedForward(0.5)).values():
        assert value["guessed"] == 1.0 and value["logp"] == pytest.approx(
            value["gold_logp"], abs=1e-5
        )


def pair(rewards, demonstration=(9, 8, 3), number=0):
    return group(
        [trajectory([1], range(5, 6 + k)) for k in range(1, 1 + len(rewards))],
        rewards,
        demonstration=demonstration,
        number=number,
    )


def test_carft_without_contrast_is_reft():
    """Section 11(g)."""
    batch = Batch(0, (pair([1.0, 0.1]), pair([0.0], number=1)), ())

    def look(method):
        return inspect(
            method, batch, ramp, reference=lambda r: ramp(r) - 0.1, value=lambda r: 0.1 * ramp(r)
        )

    ours, reft = (
        look(make_method("carft", {"contrast": 0.0})),
        look(make_method("reft", {"sft_steps": 0, "policy": {"critic": {"kl": 0.05}}})),
    )
    assert (
        ours.loss == reft.loss
        and ours.terms == reft.terms
        and make_method("carft", {"contrast": 0.0}).forward is None
    )
    for a, b in zip(
        ours.gradients + ours.value_gradients, reft.gradients + reft.value_gradients, strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_only_right_answers_of_questions_with_a_solution_are_drawn():
    """Section 11(g): none right, no loss and no NaN.

    Each right sample counts once, however long.
    """

    def look(*groups):
        return inspect(
            make_method("carft", {}),
            Batch(0, groups, ()),
            ramp,
            reference=ramp,
            value=ramp,
            extra={"similarity": lambda r: np.full(len(r.tokens), 0.5)},
        )

    wrong = look(pair([0.1, 0.0]))
    assert wrong.terms["contrast"] == 0.0 and np.isfinite(wrong.loss) and len(wrong.rows) == 2
    out = look(
        pair([1.0, 0.1]), pair([1.0, 1.0], number=1), pair([1.0], demonstration=None, number=2)
    )
    assert out.denominators["contrast"] == 3.0 and out.terms["contrast"] == pytest.approx(
        -0.5 / 0.2
    )
    assert [(r.source == Source.EXPERT).any() for r in out.rows] == [False] * 5 + [
        True
    ] * 2 and out.coefficients["anchor"] == 0.0


def test_carft_as_code_adds_up_all_samples_where_one_is_right():
    """The authors' loop on two micro-batches of two samples: sum_i loss_i * sum_j c_j / sum_j c_j,
    averaged over the micro-batches.
    """
    similarities = {5: 0.5, 6: -0.2, 7: 0.95, 8: 0.1}
    groups = [
        group([trajectory([1], [first])], [reward], demonstration=[9, 3], number=n)
        for n, (first, reward) in enumerate(zip(similarities, (1.0, 0.1, 0.0, 1.0), strict=True))
    ]
    loss = -np.minimum(list(similarities.values()), 0.9) / 0.2
    correct = np.array([1.0, 0.0, 0.0, 1.0])
    parts = []
    for one in (slice(0, 2), slice(2, 4)):
        matrix = loss[one][None, :] * correct[one][:, None]  # the mask is [2, 1] there
        parts.append(matrix.sum() / correct[one].sum())
    extra = {
        "similarity": lambda r: np.full(len(r.tokens), similarities.get(int(r.tokens[-1]), 0.0))
    }

    def look(method, groups=groups):
        return inspect(
            method, Batch(0, tuple(groups), ()), ramp, reference=ramp, value=ramp, extra=extra
        )

    out = look(make_method("carft", {"as": "code", "micro_batch": 2, "contrast": 0.3}))
    assert out.coefficients["contrast"] * out.terms["contrast"] == pytest.approx(
        0.3 * np.mean(parts), rel=1e-5
    )
    paper = look(make_method("carft", {"contrast": 0.3}))
    assert paper.coefficients["contrast"] == 0.3 and paper.terms["contrast"] == pytest.approx(
        loss[[0, 3]].mean(), rel=1e-5
    )
    assert look(make_method("carft", {"as": "code"}), groups[1:3]).terms["contrast"] == 0.0, (
        "nobody is right"
    )
    with pytest.raises(ValueError, match="paper, code"):
        make_method("carft", {"as": "codee"})


def test_the_head_that_embeds_is_linear_relu_linear():
    """As in the authors' code, by torch's own modules; the embedding is what goes into the ReLU."""
    from tandem.engine.model.heads import ValueHead

    head, hidden = ValueHead(torch.zeros(7, 5), embedding=6), torch.randn(4, 5)
    with torch.no_grad():
        head.weight.copy_(torch.randn(6))
        head.bias.fill_(0.3)
    first, second = torch.nn.Linear(5, 6, bias=False), torch.nn.Linear(6, 1)
    first.weight.data, second.weight.data, second.bias.data = (
        head.embedding.data,
        head.weight.data[None],
        head.bias.data,
    )
    value, u = head(hidden, embed=True)
    torch.testing.assert_close(value, second(torch.nn.functional.relu(first(hidden))).squeeze(-1))
    torch.testing.assert_close(u, first(hidden))


def test_attraction_stops_at_the_cap():
    """Section 11(g): beyond 0.9 the gradient is zero."""
    s = torch.tensor([0.5, 0.95], requires_grad=True)
    loss, _ = Attraction()(tokens([-1.0, -1.0], similarity=s))
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach(), [-2.5, -4.5])
    np.testing.assert_allclose(s.grad, [-5.0, 0.0])


def test_similarity_by_hand():
    """Values pool: weights softmax(0, ln 3) = 1/4, 3/4 give z = (1, 3)/4 against the
    demonstration's (1, 0); no demonstration in the group: 0.
    """
    value = torch.tensor([0.0, np.log(3.0), 7.0, 1.0, 5.0], dtype=torch.float32, requires_grad=True)
    u = torch.tensor(
        [[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [1.0, 1.0], [1.0, 1.0]], requires_grad=True
    )
    tags = {
        "segment": torch.tensor([0, 0, 1, 2, 3]),
        "group": torch.tensor([4, 4, 4, 5, -1]),
        "source": torch.tensor([1, 1, 2, 1, 2]),
    }
    found = similarity(value, u, tags["segment"], tags["group"], tags["source"])
    np.testing.assert_allclose(
        found.detach(), [1 / np.sqrt(10)] * 2 + [1.0, 0.0, 0.0], rtol=1e-5, atol=1e-6
    )
    found[:2].sum().backward()
    assert (
        u.grad[0].any()
        and value.grad[:2].any()
        and not u.grad[2].any()
        and not value.grad[2:].any()
    ), "the demonstration's side is fixed"


def test_carft_trains_the_same_however_it_is_packed_and_draws_answers_closer(model_path):
    method = make_method(
        "carft", {"contrast": 1.0, "policy": {"critic": {"kl": 0.0, "whiten": False}}}
    )
    batch = Batch(
        0,
        tuple(pair([1.0, 1.0, 0.0], number=n, demonstration=(20 + n, 31, 33, 3)) for n in range(3)),
        (),
    )
    terms, reports, seen = tuple(method.terms(batch)), [], []
    for budget in (10_000, 30):
        rank = learner(model_path, {"name": "carft"})
        assert rank.engine.module.critic.embedding.shape == (64, 32)
        rows = method.rows(batch)
        rows = method.credit(
            [
                r.with_streams(old_value=v)
                for r, v in zip(rows, rank.compute_streams(rows, 1.0)["value"], strict=True)
            ],
            batch,
        )
        micros = pack(rows, terms, 1, budget, version=0)
        for micro in micros[0]:
            assert all(
                sum(rows[i].group == g for i in micro.rows) == sum(row.group == g for row in rows)
                for g in set(micro.group.tolist())
            ), "a group was torn"
        plan = StepPlan(
            terms, denominators(terms, rows), micros, learning_rate=1e-3, forward=method.forward
        )
        reports.append(rank.step(plan).metrics)
        seen.append(rank.step(plan).metrics["contrast/similarity"])
    whole, parts = reports
    for key in ("loss", "grad_norm", "loss/contrast", "contrast/similarity"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-4), key
    assert seen[0] > whole["contrast/similarity"] + 1e-3
    assert isinstance(method.forward, PairedForward)
