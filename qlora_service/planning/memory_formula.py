"""The memory of a job's largest step in closed form: the figures of `planning.simulation`, from shapes alone.

Terms follow the code of the step (`llama_layers.py`, `lora_linear.py`, `cross_entropy.py` in `training/network`): the
bytes that a layer keeps for the backward pass, and the additional bytes at each moment that can be the peak. A test
compares them with the simulator. Bytes are those of tensors; no device is queried.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_service.planning.adapter_shapes import (
    ADALORA_STATISTICS,
    AdapterShape,
    adapter_shape,
    optimizer_bytes,
    virtual_tokens,
)
from qlora_service.planning.cards import resolved_dtype
from qlora_service.planning.largest_step import LargestStep, largest_step
from qlora_service.planning.layer_cost import DORA, FAST, LayerCost, layer_cost
from qlora_service.planning.memory import FLOAT32_BYTES, MIB, Category, Memory
from qlora_service.planning.shapes import Matrix, ModelShape
from qlora_service.planning.simulation.allocator import CUBLAS_WORKSPACE_BYTES, ROUNDING, rounded
from qlora_service.specs import JobSpec, Oft, PromptMethod, Quantization
from qlora_service.training.sizes import CPU_ROWS, HEAD_CHUNK

Bytes = dict[Category, int]
FRAGMENTED_SHARE, FRAGMENTED_BYTES = 0.05, 80 * MIB
"""Reserved minus allocated bytes: a share plus a constant, fitted to the simulator; within 4 % of it from 4 GiB on"""


def estimated_memory(
    shape: ModelShape,
    spec: JobSpec,
    *,
    micro_batch_tokens: int,
    checkpointing: bool,
    cuda: bool = True,
    longest_tokens: int | None = None,
    compute_dtype: str | None = None,
) -> Memory:
    """The peak memory of the job's largest step; arguments are those of `Simulator.simulate`."""
    step = largest_step(
        spec,
        micro_batch_tokens=micro_batch_tokens,
        longest_tokens=longest_tokens or shape.longest_tokens(spec),
    )
    width = 2 if resolved_dtype(spec, cuda=cuda, auto=compute_dtype) == "bfloat16" else FLOAT32_BYTES
    adapter = adapter_shape(spec.adapter, shape)
    job = _Job(shape, spec, adapter, layer_cost(spec, shape), step, width, checkpointing, cuda)
    resident, paged = _resident_bytes(job)
    peak = max(_peak_candidates(job), key=lambda moment: sum(moment.values()))
    categories = {category: resident.get(category, 0) + peak.get(category, 0) for category in Category}
    allocated = sum(categories.values())
    fragmented = int(allocated * FRAGMENTED_SHARE) + FRAGMENTED_BYTES if cuda else 0
    return Memory(categories, allocated + fragmented, paged, adapter.trained_parameters)


@dataclass(frozen=True)
class _Job:
    """The values that all terms are computed from."""

    shape: ModelShape
    spec: JobSpec
    adapter: AdapterShape
    layer_cost: LayerCost
    step: LargestStep
    width: int
    """Bytes per number in the compute dtype"""
    checkpointing: bool
    cuda: bool

    @property
    def tokens(self) -> int:
        """Positions of the micro-batch, virtual tokens included."""
        return self.step.tokens + len(self.step.lengths) * virtual_tokens(self.spec.adapter)

    @property
    def is_fast(self) -> bool:
        return self.layer_cost is FAST

    def activation_bytes(self, features: int) -> int:
        """Bytes of an activation with this many features, in the compute dtype."""
        return self.tokens * features * self.width

    def rank_sum(self, *modules: str) -> int:
        """Features of x Aᵀ, summed over the modules."""
        return sum(self.adapter.ranks.get(name, 0) for name in modules)


def _resident_bytes(job: _Job) -> tuple[Bytes, int]:
    """(bytes allocated between two steps, bytes of optimizer state that can page)."""
    shape, quantization = job.shape, job.spec.quantization
    packed = [_matrix_bytes(matrix, quantization, job.width) for matrix in shape.matrices.values()]
    norm_vectors = shape.layers * 2 + 1
    embeddings = (1 if shape.tied else 2) * rounded(shape.vocabulary * shape.hidden * job.width)
    norms = norm_vectors * rounded(shape.hidden * job.width) + job.width * _bias_and_head_norm_features(shape)
    experts = (shape.experts - 1) * 3 * shape.hidden * shape.intermediate * job.width
    weights = shape.layers * sum(weight for weight, _ in packed)
    unquantized = embeddings + norms + shape.layers * experts
    if quantization.type == "none":
        weights, unquantized = 0, unquantized + weights
    state, paged = optimizer_bytes(job.spec.training, job.adapter.tensors, cuda=job.cuda)
    if job.spec.adapter.method == "adalora":
        state += ADALORA_STATISTICS * job.adapter.trained_bytes
    return {
        Category.WEIGHTS: weights,
        Category.CONSTANTS: shape.layers * sum(constants for _, constants in packed),
        Category.UNQUANTIZED: unquantized,
        Category.ADAPTER: job.adapter.trained_bytes + FLOAT32_BYTES * job.adapter.frozen,
        Category.GRADIENTS: 0 if job.step.is_whole_step else job.adapter.trained_bytes,
        Category.OPTIMIZER: state,
        Category.WORKSPACE: CUBLAS_WORKSPACE_BYTES if job.cuda else 0,
    }, paged


def _matrix_bytes(matrix: Matrix, quantization: Quantization, width: int) -> tuple[int, int]:
    """(bytes of a stored weight, bytes of its quantization constants).

    NF4 and FP4: half a byte per weight and a float32 constant per 64; with double quantization a byte per 64 and a
    float32 per 256 of those (arXiv:2305.14314, section 3), and the tables of both codes.
    """
    out, inside = matrix
    size = out * inside
    if quantization.type == "none":
        return size * width, 0
    if quantization.type == "int8":
        return size, rounded(FLOAT32_BYTES * out)
    blocks = -(-size // 64)
    if not quantization.double_quant:
        return rounded(size // 2), rounded(FLOAT32_BYTES * blocks) + ROUNDING
    return rounded(size // 2), rounded(blocks) + rounded(FLOAT32_BYTES * -(-blocks // 256)) + 2 * ROUNDING + 1024


def _bias_and_head_norm_features(shape: ModelShape) -> int:
    biases = shape.queries + 2 * shape.keys if shape.attention_bias else 0
    return shape.layers * (biases + (2 * shape.head_dim if shape.head_norms else 0))


def _peak_candidates(job: _Job) -> list[Bytes]:
    """Bytes in addition to the resident ones at each moment that can be the peak."""
    layers, gradient = job.shape.layers, job.adapter.trained_bytes
    saved = _saved_bytes(job)
    kept = _kept_bytes(job) if job.checkpointing else saved
    # A recomputed layer saves all its activations again but its input, which was kept; int8 has its inputs twice.
    recomputed = saved if job.layer_cost.survives_checkpointing else saved - kept
    before_head = _input_bytes(job) + layers * kept
    at_last_layer = before_head + (recomputed if job.checkpointing else 0)
    at_first_layer = at_last_layer - (layers - 1) * kept
    # In a step of one micro-batch gradients grow while activations are freed: the peak is in the last or first layer.
    grown = gradient if job.step.is_whole_step else 0
    moments = [_head_forward(job, before_head), _head_backward(job, before_head), {Category.GRADIENTS: grown}]
    backwards = [_mlp_backward(job), _attention_backward(job)] if job.is_fast else [_general_backward(job)]
    for activations, gradients in ((at_last_layer, 0), (at_first_layer, grown and grown - job.adapter.layer_bytes())):
        base = {Category.ACTIVATIONS: activations, Category.GRADIENTS: gradients}
        moments += [_sum(base, backward) for backward in backwards]
    if job.cuda and job.spec.training.optim == "adamw_torch":
        # torch's multi-tensor update allocates a square root of each second moment.
        moments.append({Category.GRADIENTS: grown, Category.OPTIMIZER: gradient})
    return moments


def _sum(*parts: Bytes) -> Bytes:
    return {category: sum(part.get(category, 0) for part in parts) for part in parts for category in part}


def _input_bytes(job: _Job) -> int:
    """Ids, positions, predictors and targets, and the rotation's cosines and sines."""
    return 4 * 8 * job.tokens + 2 * job.activation_bytes(job.shape.head_dim)


def _saved_bytes(job: _Job) -> int:
    """Bytes that a layer saves for its backward pass."""
    shape, cost = job.shape, job.layer_cost
    qkv = shape.queries + 2 * shape.keys
    saved = job.activation_bytes(2 * shape.hidden + qkv + shape.queries + 2 * shape.intermediate)
    # Scales of the norms, and of the softmax.
    per_token = 2 * FLOAT32_BYTES + (FLOAT32_BYTES * shape.heads if job.cuda else 0)
    per_token += job.rank_sum(*shape.matrices) * (cost.rank_width or job.width)
    if shape.head_norms and job.is_fast:
        saved += job.activation_bytes(shape.queries + shape.keys)
        per_token += FLOAT32_BYTES * (shape.heads + shape.kv_heads)
    if cost.keeps_inputs:
        saved += job.activation_bytes(2 * shape.hidden + shape.intermediate)
    for name in job.adapter.by_module:
        out, inside = shape.matrices.get(name, (0, 0))
        per_token += int(cost.per_input_feature * inside + cost.per_output_feature * out)
        saved += _oft_rotation_bytes(job, inside)
    return saved + per_token * job.tokens


def _oft_rotation_bytes(job: _Job, inside: int) -> int:
    """OFT's blocks along the input's diagonal, in four steps from the skew-symmetric matrix to the rotation."""
    adapter = job.spec.adapter
    return 4 * FLOAT32_BYTES * adapter.oft_block_size * inside if isinstance(adapter, Oft) else 0


def _kept_bytes(job: _Job) -> int:
    """Bytes that a layer keeps although its activations are recomputed."""
    kept = job.activation_bytes(job.shape.hidden)
    if job.layer_cost.survives_checkpointing:
        kept += job.activation_bytes(2 * job.shape.hidden + job.shape.queries + job.shape.intermediate)
    return kept


def _general_backward(job: _Job) -> Bytes:
    """Bytes in addition to the saved ones in the backward pass of a layer outside the fast path."""
    cost = job.layer_cost
    hidden, intermediate = cost.extra_with_checkpointing if job.checkpointing else cost.extra
    # The figures are for two bytes per number, or for float32 next to any compute dtype.
    extra = job.tokens * (hidden * job.shape.hidden + intermediate * job.shape.intermediate) * (job.width / 2)
    # DoRA adds A and B to the weight, whether it is quantized or not.
    dequantizes = job.spec.quantization.type in {"nf4", "fp4"} or cost is DORA
    weight = int(cost.per_mlp_weight * job.shape.hidden * job.shape.intermediate) if dequantizes else 0
    return {Category.RECOMPUTATION: int(extra), Category.DEQUANTIZATION: weight}


def _head_forward(job: _Job, activations: int) -> Bytes:
    """A chunk of logits with its float32 probabilities; the hidden states, normed, and their gradient.

    Prompt methods have the logits of all documents, and two gradients of those of one document.
    """
    if isinstance(job.spec.adapter, PromptMethod):
        positions = job.step.tokens + 2 * max(job.step.lengths)
        return {Category.ACTIVATIONS: activations, Category.LOGITS: FLOAT32_BYTES * job.shape.vocabulary * positions}
    chunk = min(HEAD_CHUNK, job.tokens)
    float32_copies = 2 if job.width < FLOAT32_BYTES else 1
    rows = chunk if job.cuda else min(CPU_ROWS, chunk)
    logits = job.shape.vocabulary * (chunk * job.width + rows * FLOAT32_BYTES * float32_copies)
    return {
        Category.ACTIVATIONS: activations + job.activation_bytes(3 * job.shape.hidden),
        Category.LOGITS: logits,
    }


def _head_backward(job: _Job, activations: int) -> Bytes:
    """The backward pass of the final norm."""
    return {
        Category.ACTIVATIONS: activations + job.activation_bytes(job.shape.hidden),
        Category.RECOMPUTATION: job.activation_bytes(2 * job.shape.hidden) + _norm_backward_bytes(job),
    }


def _norm_backward_bytes(job: _Job) -> int:
    """Three float32 copies of the hidden states; on a CPU of a few rows only, which do not count."""
    return 3 * FLOAT32_BYTES * job.tokens * job.shape.hidden if job.cuda else 0


def _mlp_backward(job: _Job) -> Bytes:
    """silu, the gradients of its input and of the gate, the normed input and its gradient.

    Then a dequantized weight or the norm's backward pass, whichever is larger.
    """
    shape = job.shape
    live = job.activation_bytes(3 * shape.intermediate + 3 * shape.hidden) + job.adapter.layer_bytes(
        "gate_proj", "up_proj", "down_proj"
    )
    is_quantized = job.spec.quantization.type != "none"
    dequantized = shape.intermediate * shape.hidden * job.width if is_quantized else 0
    norm = job.activation_bytes(shape.hidden) + _norm_backward_bytes(job)
    if norm > dequantized:
        return {Category.RECOMPUTATION: live + norm}
    return {Category.RECOMPUTATION: live, Category.DEQUANTIZATION: dequantized}


def _attention_backward(job: _Job) -> Bytes:
    """The gradients of queries, keys and values, and flash attention's sums; the MLP's activations are freed."""
    shape = job.shape
    mlp_rank = job.rank_sum("gate_proj", "up_proj", "down_proj")
    freed = job.activation_bytes(2 * shape.intermediate + shape.hidden + mlp_rank)
    qkv = shape.queries + 2 * shape.keys
    live = job.activation_bytes(qkv + shape.queries + shape.hidden) + job.adapter.layer_bytes() - freed
    if not job.cuda:
        return {Category.RECOMPUTATION: live}
    sums = FLOAT32_BYTES * job.tokens * (shape.queries + shape.heads)
    expanded = 0 if shape.heads == shape.kv_heads else job.activation_bytes(2 * shape.queries)
    return {Category.RECOMPUTATION: live, Category.WORKSPACE: sums + expanded}
