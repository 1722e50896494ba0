"""Distillation in chunks of tokens: neither the student's logits nor the teacher's live whole."""
# ruff: noqa: ANN001 - a kernel's arguments are pointers p_ and numbers

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.define import define, triton_runs
from farspan.kernels.linear_cross_entropy import Formed, Gradients, Logits, chunks, shapes

__all__ = ["linear_kl", "linear_kl_ref"]


def linear_kl_ref(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    counted: Tensor,
    *,
    temperature: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """The specification: `linear_kl` with the logits whole, differentiable by autograd."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    uncounted = ~counted.unsqueeze(1)
    with torch.no_grad():
        teacher = (teacher_hidden.to(dtype) @ teacher_weight.to(dtype).T).masked_fill(uncounted, 0)
        log_p = torch.log_softmax(teacher / temperature, 1)
    student = (hidden.to(dtype) @ weight.to(dtype).T).masked_fill(uncounted, 0)
    log_q = torch.log_softmax(student / temperature, 1)
    losses = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1)
    return (losses * counted * (1 if weights is None else weights.to(dtype))).sum()


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    counted: Tensor,
    *,
    temperature: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Summed divergence KL(teacher ‖ student), in nats, of the next tokens' distributions, times temperature².

    hidden: N D, weight: V D of one dtype; teacher_hidden: N D', teacher_weight: V D' of one dtype; counted: N bool, and
    where it is False hidden may hold anything finite; weights: N numbers that the tokens' losses are multiplied by.
    Both sides' logits are divided by `temperature`; its square keeps gradients as large at every temperature (Hinton et
    al., 2015, section 2). Returns a scalar of at least fp32. Gradients go to the student alone, formed in the forward
    like those of `linear_cross_entropy`: three products of the student and one of the teacher. A loss of labels beside
    it is a second call and three products more.
    Errors: ValueError for shapes, dtypes or a temperature that do not fit.
    """
    _check((hidden, weight), (teacher_hidden, teacher_weight), counted, weights, temperature)
    asked = torch.is_grad_enabled() and hidden.requires_grad, torch.is_grad_enabled() and weight.requires_grad
    inputs = (x.detach() for x in (hidden, weight, teacher_hidden, teacher_weight))
    sums = torch.promote_types(weight.dtype, torch.float32)
    formed = _forward(*inputs, counted, None if weights is None else weights.detach(), temperature, sums, *asked)
    loss: Tensor = Formed.apply(hidden, weight, *formed)
    return loss


def _check(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    counted: Tensor,
    weights: Tensor | None,
    temperature: float,
) -> None:
    for name, (hidden, weight) in (("", student), ("teacher_", teacher)):
        fit = hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
        if not fit or hidden.shape[0] != student[0].shape[0] or weight.shape[0] != student[1].shape[0]:
            found = f"{name}hidden {tuple(hidden.shape)}, {name}weight {tuple(weight.shape)}"
            raise ValueError(f"linear_kl: {found} do not fit; they are N D and V D, with the student's N and V")
        if hidden.dtype != weight.dtype:
            found = f"{name}hidden {hidden.dtype}, {name}weight {weight.dtype}"
            raise ValueError(f"linear_kl: {found}; cast one to the other's")
    for name, each in (("counted", counted), ("weights", weights)):
        if each is not None and each.shape != student[0].shape[:1]:
            raise ValueError(
                f"linear_kl: {name} {tuple(each.shape)} must be {tuple(student[0].shape[:1])}: one a token"
            )
    if counted.dtype != torch.bool:
        raise ValueError(f"linear_kl: counted is {counted.dtype}; it must be bool, and numbers go to weights")
    if not temperature > 0:
        raise ValueError(f"linear_kl: temperature={temperature} must be above 0")


def _run(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    counted: Tensor,
    weights: Tensor | None,
    temperature: float,
    sums: torch.dtype,
    d_hidden: bool,
    d_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses N, and the gradients of their sum, empty where not asked for."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    each = counted.to(wide) if weights is None else torch.where(counted, weights.to(wide), 0)
    gradients = Gradients(hidden, weight, sums, d_hidden, d_weight)
    losses = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
    fused, wanted = triton_runs(hidden, weight, teacher_hidden, teacher_weight), d_hidden or d_weight
    parts = chunks(hidden, weight, halved=True)  # two of them at a time
    heads = Logits(parts, hidden, weight, fused=fused), Logits(parts, teacher_hidden, teacher_weight, fused=fused)
    with torch.cuda.device_of(hidden):
        for part in parts:
            student, teacher = (head.of(part) for head in heads)
            if fused:
                losses[part] = _rows_fused(student, teacher, each[part], temperature, gradient=wanted)
            else:
                losses[part], student = _rows_ref(student, teacher.to(wide), each[part], temperature)
            if wanted:
                gradients.add(part, student)
    return losses, gradients.hidden, gradients.weight


_forward = define(
    "linear_kl(Tensor hidden, Tensor weight, Tensor teacher_hidden, Tensor teacher_weight, Tensor counted,"
    " Tensor? weights, float temperature, ScalarType sums, bool d_hidden, bool d_weight) -> (Tensor, Tensor, Tensor)",
    _run,
    shapes,
)


def _rows_ref(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Losses of N tokens and the gradient of their sum, from two times N V logits, in plain torch."""
    log_q, log_p = (torch.log_softmax(x / temperature, 1) for x in (student, teacher))
    p, each = log_p.exp(), weights.unsqueeze(1)
    losses = (p * log_p.sub_(log_q)).sum(1)
    return weights * losses * temperature**2, log_q.exp_().sub_(p).mul_(each * temperature)


def _rows_fused(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float, *, gradient: bool) -> Tensor:
    """`_rows_ref` in one kernel: the gradient takes the place of the student's logits."""
    losses, width = torch.empty_like(weights), student.shape[1]
    strides = student.stride(0), teacher.stride(0)
    grid = (student.shape[0],)
    _rows[grid](student, teacher, weights, losses, temperature, width, *strides, gradient=gradient, **_shape(width))
    return losses


def _shape(width: int) -> dict[str, int | bool]:
    """One program a row: of 16 entries a thread and side, which is what fits in its registers beside five sums each."""
    block = max(256, min(8192, triton.next_power_of_2(width)))
    warps = max(1, block // 512)
    b_l = min(block, 256 * warps)  # 8 neighbours a thread: 16 bytes of bf16
    return {"even": width % 16 == 0, "b_k": block // b_l, "b_l": b_l, "num_warps": warps}


@triton.jit
def _load(p_row, column, width, end, scale, even: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.load(p_row + column, mask=column < end, other=float("-inf")).to(tl.float32) * scale
    return x if even else tl.where(column < width, x, float("-inf"))


# Blocks, and the room at a row's end, are as in cross_entropy.py.


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    p_student,
    p_teacher,
    p_weights,
    p_losses,
    temperature,
    width,
    student_row,
    teacher_row,
    gradient: tl.constexpr,
    even: tl.constexpr,
    b_k: tl.constexpr,
    b_l: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_x, p_y = p_student + row * student_row, p_teacher + row * teacher_row
    weight, scale = tl.load(p_weights + row), 1.0 / temperature
    inside = tl.arange(0, b_k)[:, None] * b_l + tl.arange(0, b_l)[None, :]
    end, last = (width + 15) // 16 * 16, (width - 1) // (b_k * b_l)
    if weight != 0.0:
        x_most = tl.full([b_l], -3.4028234663852886e38, tl.float32)  # finite: -inf - -inf is NaN
        x_total = tl.zeros([b_l], tl.float32)
        y_most, y_total, apart = x_most, x_total, x_total
        for block in tl.range(0, last + 1, num_stages=3):
            column = block * (b_k * b_l) + inside
            x = _load(p_x, column, width, end, scale, even)
            y = _load(p_y, column, width, end, scale, even)
            x_new, y_new = tl.maximum(x_most, tl.max(x, 0)), tl.maximum(y_most, tl.max(y, 0))
            x_total = x_total * tl.exp(x_most - x_new) + tl.sum(tl.exp(x - x_new[None, :]), 0)
            p, fade = tl.exp(y - y_new[None, :]), tl.exp(y_most - y_new)
            y_total = y_total * fade + tl.sum(p, 0)
            apart = apart * fade + tl.sum(tl.where(p == 0.0, 0.0, p * (y - x)), 0)
            x_most, y_most = x_new, y_new
        x_largest, y_largest = tl.max(x_most, 0), tl.max(y_most, 0)
        x_sum, fade = tl.sum(x_total * tl.exp(x_most - x_largest), 0), tl.exp(y_most - y_largest)
        y_sum = tl.sum(y_total * fade, 0)
        lse_apart = (x_largest - y_largest) + tl.log(x_sum) - tl.log(y_sum)
        loss = tl.sum(apart * fade, 0) / y_sum + lse_apart
        tl.store(p_losses + row, weight * temperature * temperature * loss)
        if gradient:
            size = weight * temperature
            for block in tl.range(0, last + 1, num_stages=3):
                column = (last - block) * (b_k * b_l) + inside
                x = _load(p_x, column, width, end, scale, even)
                y = _load(p_y, column, width, end, scale, even)
                d = size / x_sum * tl.exp(x - x_largest) - size / y_sum * tl.exp(y - y_largest)
                tl.store(p_x + column, d.to(p_x.dtype.element_ty), mask=column < end)
    else:
        tl.store(p_losses + row, 0.0)
        if gradient:
            zero = tl.zeros([b_k, b_l], p_x.dtype.element_ty)
            for block in range(0, last + 1):
                column = block * (b_k * b_l) + inside
                tl.store(p_x + column, zero, mask=column < end)
