"""A rollout backend of your own: transformers' `model.generate`, one request after the other.

    rollout:
      backend: docs/examples/my_backend.py:GenerateBackend
      backend_options: {rows: 16}

It is slower than `hf`, which decodes all waiting requests together; it shows all that a backend
must do. The suite that it passes:

    export TANDEM_BACKEND=docs/examples/my_backend.py:GenerateBackend
    pytest tests/contract/test_backends.py
"""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandem.engine.core.errors import EngineDied, SyncError
from tandem.engine.core.outcomes import Installed
from tandem.engine.core.types import Finish
from tandem.engine.weights.digest import combine, digest
from tandem.rollout.backend import Backend
from tandem.rollout.trajectories import prefixes_of, trajectory

NOTHING = np.zeros(0, np.int32)


class GenerateBackend(Backend):
    def __init__(self, model_path, config, seed, *, rows: int = 64):
        """`rows`: how many samples of a request are decoded at once."""
        code = config.model.trust_remote_code
        dtype = getattr(torch, config.model.dtype)
        tokenizer = AutoTokenizer.from_pretrained(
            config.model.tokenizer or model_path, trust_remote_code=code
        )
        self.model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=dtype, trust_remote_code=code
        ).eval()
        self.model.requires_grad_(False)
        # a tied weight under each of its names
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.stop = tokenizer.eos_token_id
        self.rows, self.seed, self.calls = rows, seed, 0
        self.version = 0
        self.updating = False

    # -- generation

    async def generate(self, request):
        if self.updating:
            raise EngineDied("a weight update did not finish")
        self.calls += 1
        entropy = [self.seed, self.calls]
        if request.sampling.seed is not None:
            entropy = [request.sampling.seed, request.group]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        found = []
        with torch.random.fork_rng(devices=[]):  # the learner may compute in this process, too
            torch.manual_seed(seed)
            for prefix, samples in self.batches(request):
                found += self.sample(request, prefix, samples)
        return found

    def batches(self, request):
        """(forced prefix, number of samples) of each call of `model.generate`."""
        if request.prefixes or request.sampling.temperature == 0:
            return [(prefix, 1) for prefix in prefixes_of(request)]
        starts = range(0, request.samples, self.rows)
        return [(NOTHING, min(self.rows, request.samples - start)) for start in starts]

    def sample(self, request, prefix, samples):
        sampling = request.sampling
        most = sampling.max_tokens - len(prefix)
        if most < 1:  # the prefix is the whole response
            whole = trajectory(request, prefix, NOTHING, np.zeros(0), self.version, Finish.LENGTH)
            return [whole] * samples
        context = np.concatenate([request.prompt.tokens, prefix])
        ids = torch.from_numpy(context).long()[None]
        how = {"do_sample": False}
        if sampling.temperature > 0:
            how = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": 0,
            }
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            min_new_tokens=max(0, sampling.min_tokens - len(prefix)),
            num_return_sequences=samples,
            eos_token_id=self.stop,
            pad_token_id=self.stop,
            return_dict_in_generate=True,
            output_scores=True,
            **how,
        )
        tokens = output.sequences[:, ids.shape[1] :]  # [samples, T]
        # log-probs of the distribution that was sampled from: scores are scaled and truncated
        scores = torch.stack(output.scores, 1).float().log_softmax(-1)  # [samples, T, V]
        logp = scores.gather(-1, tokens[..., None]).squeeze(-1)
        return [
            self.answer(request, prefix, *row)
            for row in zip(tokens.numpy(), logp.numpy(), strict=True)
        ]

    def answer(self, request, prefix, tokens, logp):
        ends = np.flatnonzero(tokens == self.stop)
        finish, length = Finish.LENGTH, len(tokens)
        if len(ends):
            finish, length = Finish.STOP, ends[0] + 1  # the end token belongs to the response
        return trajectory(request, prefix, tokens[:length], logp[:length], self.version, finish)

    async def logprobs(self, tokens):
        logp = self.model(torch.from_numpy(tokens).long()[None]).logits[0].float().log_softmax(-1)
        return logp[:-1].gather(-1, torch.from_numpy(tokens[1:, None]).long())[:, 0].numpy()

    # -- weights

    async def start_weight_update(self):
        self.updating, self.received = True, {}

    async def update_weights(self, update_info):
        for name, tensor in update_info["named"]:
            if name not in self.parameters:
                raise SyncError(f"weights were sent for {name!r}, which this model does not have")
            self.parameters[name].copy_(tensor.detach())
            self.received[name] = digest(tensor)

    async def finish_weight_update(self, version):
        arrived = {id(self.parameters[name]) for name in self.received}
        missing = [name for name, p in self.parameters.items() if id(p) not in arrived]
        if missing:
            raise SyncError(f"weights {version} are incomplete: {', '.join(missing)} were not sent")
        self.version, self.updating = version, False
        return Installed(self.received, version, await self.active_digest())

    async def weight_version(self):
        return self.version

    async def active_digest(self):
        return combine({name: digest(p) for name, p in self.model.named_parameters()})
