"""How v3 runs, on Hopper alone: its tiles, rings and schedules, a reason beside each number.

Pure functions of spec and target. "Measured" is as in `tuning`, which has what all versions share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, gcd

import torch

from triflash.mods import score_bound
from triflash.spec import AttentionSpec
from triflash.target import Target
from triflash.tuning import (
    TileConfig,
    block_d,
    flops,
    in_the_loop,
    loads_modifications,
    masks_both_sides,
    modifies,
    widest,
)

_SECTION_BYTES = 32 * 2**20
_HOPPER_SHARED = 226 * 1024  # of the 227 KiB a program may have; barriers take the rest


@dataclass(frozen=True)
class HopperConfig:
    """How v3's forward runs.

    Attributes:
        block_n: keys a step.
        stages, stages_k: blocks of v, and of k, in shared memory.
        slots_q: tiles of 64 rows of q in shared memory: one a consumer, or more.
        consumers: warpgroups of 64 queries each.
        dynamic: programs draw their tiles from a counter.
        section: heads that are worked on together.
        widths, widths_v: the parts that columns of q and k, and of v and out, are loaded in.
        hold: p v overlaps all of the softmax, not only its maximum.
        turns: warpgroups issue their products one after the other.
        q_in_registers: q comes from registers, its first part at least.
        half_q: only half of its columns do.
        alias: out leaves through the shared memory of q, where that is scarce.
        bounded: exponentials are relative to 0 instead of a row's largest score.
        kept: exponentials are relative to the largest score of a row's first block, where each row
            has one; another kernel runs behind, for what that is not right for.
        num_warps, num_stages: Triton's options; the warps are those of one consumer.
    """

    block_n: int
    stages: int
    stages_k: int
    slots_q: int
    consumers: int
    dynamic: bool
    section: int
    widths: tuple[int, ...]
    widths_v: tuple[int, ...]
    hold: bool
    turns: bool
    q_in_registers: bool
    half_q: bool = False
    alias: bool = False
    bounded: bool = False
    kept: bool = False
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class HopperBackwardConfig:
    """How v3's backward runs.

    Attributes:
        block_m: queries a step.
        block_n: keys of a program.
        width, width_v: what headdim and headdim_v are filled up to in shared memory; 96 and 192 lie
            there in two parts, see `widths_of`.
        stages, dout_stages: blocks of q, and of dout, in shared memory.
        late_dp: the product for dp is issued behind p.
        late_dv: the product for dv is issued behind ds.
        fused: a modification of scores comes in its fused form.
        fenced: scores are modified behind a branch, so that ptxas moves nothing of it, which then
            begins with too much at once.
        fold: the product for dp begins with -delta.
        both: p is only begun when dp is there, too; with late_dv and without late_dp.
        release: each thread releases what it has read, without a barrier of its warpgroup.
        lag: dq of a step is computed in the next, so that the warpgroups need not meet.
        backwards: programs walk from the last queries to the first.
        programs: how many there are at most, each of which walks several tiles of keys; 0 for one a
            tile.
        kv_stages: tiles of k and v in shared memory.
        splits: programs that share out the heads of a group, for each tile of keys.
        whole_heads: programs walk all tiles of a head and finish dq, in the order of its keys.
        ordered: programs finish dq, and add to a tile of it in the order of their keys, last first.
        wide: the schedule for head dimensions above 128, to which late_dv, fold, both, release and
            lag mean nothing, and the next two mean nothing elsewhere.
        halves: of the odd number of parts of 64 columns that dq has, the last is made in halves.
        ahead: q k^T of the next step begins in this one.
        num_warps, num_stages: Triton's options; the warps are those of one consumer.
    """

    block_m: int
    block_n: int
    width: int
    width_v: int
    stages: int
    dout_stages: int
    late_dp: bool = False
    late_dv: bool = False
    fused: bool = False
    fenced: bool = True
    fold: bool = True
    both: bool = False
    release: bool = False
    lag: bool = False
    backwards: bool = False
    programs: int = 0
    kv_stages: int = 1
    splits: int = 1
    whole_heads: bool = False
    ordered: bool = False
    wide: bool = False
    halves: bool = False
    ahead: bool = False
    num_warps: int = 4
    num_stages: int = 1


def pays(spec: AttentionSpec, target: Target) -> bool:
    """Whether "auto" takes v3 where it can run: where it was measured, and is faster than v2.

    From 512 on, at head dimensions 64, 128 and 256, its forward is 1.14 to 1.63 times as fast as
    v2's, its backward 1.11 to 3 times; at 40 and 80 1.3 to 5 and 1.2 to 5 times. At 32 it is 0.92
    and 0.89 times as fast at 512, 1.11 and 1.18 at 4096. Other head dimensions are taken to be like
    these. Less work than was measured goes to v2: few queries or few heads would leave
    multiprocessors without a tile.

    Packed sequences of 128 on average run 1.04 times as fast at d128, but 0.67 at d64, where those
    of 320 have 0.88 forward and 0.99 backward; 4096 rows in all 1.12 and 1.5.
    """
    if spec.varlen is not None:
        mean = min(spec.varlen.rows_q, spec.varlen.rows_k) // max(1, spec.batch)
        return mean >= (512 if widest(spec) <= 64 else 256) and flops(spec) > 1e10
    shortest = 1024 if widest(spec) <= 32 else 512
    return min(spec.seqlen_q, spec.seqlen_k) >= shortest and flops(spec) > 3e10


def fuses(spec: AttentionSpec) -> bool:
    """Whether v3 can take softcap or ALiBi in its fused form, as its forward does.

    It must be the only score modification, and the scale so large that no constant overflows.
    Measured at d128 causal, 8192: 0.79 and 0.89 of plain's speed, 0.73 and 0.78 not fused. Since
    then softcap has no maximum, and ALiBi has 0.94 by distances relative to a block.
    """
    return tuple(mod.key for mod in spec.features.score_mods) in (("softcap",), ("alibi",)) and (
        spec.softmax_scale > 1e-6
    )


def bounded(spec: AttentionSpec) -> bool:
    """Whether v3's forward takes all scores relative to 0 instead of a row's largest.

    Measured at d128 causal, 8192: softcap 0.91 of plain's speed, 0.86 with maxima; a user's soft
    sign 0.92 and 0.85. Exponentials up to e^50 = 2^72 leave 2^55 for the number of keys times the
    largest v, and none vanish. float16 has no room for them.
    """
    bound = score_bound(spec.features)
    return spec.dtype == torch.bfloat16 and bound is not None and 0.0 <= bound <= 50.0


def keeps(spec: AttentionSpec) -> bool:
    """Whether v3's forward keeps the maximum of a tile's first block, and checks the sums.

    Measured, of the speed with a running maximum, causal and full: d128 1.12 and 1.09 at 16384,
    1.08 and 1.06 at 4096, 1.03 at 1024; d64 1.11 and 1.09, 1.18 and 1.06, 1.11 and 1.15; d96 1.10.
    At 8192 causal, d128 and d64: ALiBi 1.15 and 1.21, a user's scores 1.01 and 1.11, a window of
    1024 1.16 and 1.09, sinks 1.10, packed 1.05 and 1.14. The kernel behind costs 3 us: at 512, of
    3e10 and 7e10 operations, d128 has 1.00 and 1.02. d256 has 1.00. All in bfloat16.
    """
    visible = 1.0
    if spec.features.window_left is not None:
        visible = min(1.0, 2.0 * (spec.features.window_left + 128) / max(1, spec.seqlen_k))
    # Far keys come first in a full mask: what an ALiBi there leaves grows, and is done twice, 0.56.
    grows = bool(spec.features.score_mods) and not spec.causal
    return (
        spec.dtype in (torch.bfloat16, torch.float16)
        and not bounded(spec)
        and not grows
        and widest(spec) <= 128
        and flops(spec) * visible > 5e10
    )


def forward(spec: AttentionSpec, target: Target) -> HopperConfig:
    """v3's forward, on sm_90 alone. Measured at 512 and longer."""
    section = 1
    if spec.causal:
        # Heads whose longest tiles come together: as many as leave k and v in L2, 50 MB of it.
        # Measured: 256, 409 and 482 against 241, 376 and 467 with all heads at once at d64.
        bytes_kv = 2 * spec.seqlen_k * (spec.headdim + spec.headdim_v)
        section = max(1, _SECTION_BYTES // bytes_kv) * spec.group_size
    widths, widths_v = widths_of(spec.headdim), widths_of(spec.headdim_v)
    total, total_v = sum(widths), sum(widths_v)
    alias = False
    # Measured at d128 causal, 8192, as parts of plain's speed: none of q in registers 0.91 for
    # softcap, 0.94 for ALiBi, all 0.90 and 0.90; half of it 0.92 for a user's soft sign, none 0.90,
    # and 0.78 for a mask of users, none 0.75.
    half_q = widths == (128,) and bool(spec.features.mods)
    half_q = half_q and not fuses(spec) and spec.features.blocks is None
    windows = in_the_loop(spec) == ("window",) and widths == widths_v == (128,)
    windows = windows and spec.varlen is None
    if max(total, total_v) <= 64:
        # Measured: 452 and 458 full, 356 and 357 causal at 1024 with four warpgroups of 64 keys a
        # step and 4 or 6 blocks, against 415 and 308 with three of 128; at 4096 489 and 444 against
        # 499 and 437, at 16384 516 and 501 against 533 and 513. A second q is 416 against 408.
        four = spec.seqlen_q < (8192 if spec.causal else 4096)
        consumers, block_n, most = (4, 64, 6) if four else (3, 128, 4)
        if spec.features.mods:  # whose values four warpgroups, or 128 keys, leave no registers for
            # Measured at 8192 causal: a softcap that is not bounded 0.71 of plain, one that is
            # 0.78, with four warpgroups 0.80, with 128 keys 0.77.
            hides = spec.features.mask_mod, spec.features.window_left, spec.features.window_right
            four = bounded(spec) and fuses(spec) and hides == (None, None, None)
            consumers, block_n, most = (4 if four else 3), 64, 6
        if spec.features.blocks is not None:  # which have 128 queries, or a multiple
            consumers, block_n, most = 2, 128, 4
    elif max(total, total_v) <= 128:
        # Measured: full 595 and 612 against 506 and 516 with 64 keys a step and 4 stages.
        # 128 leave no registers for what score modifications load, which may be as large as the
        # scores, nor for them beside a mask's modification or masks on both sides.
        masks = spec.features.mask_mod is not None or masks_both_sides(spec)
        tight = _loads_scores(spec) or (modifies(spec) and masks)
        consumers, block_n, most = (2, 64, 6) if tight else (2, 128, 3)
        if windows:
            # 64 keys visit less at both edges; three warpgroups fill a tile's beginning and end.
            # Measured, ms at 8192 against two of 128 keys: 0.254 and 0.265 for a causal window of
            # 1024, 0.109 and 0.118 of 256, 0.717 and 0.744 of 4096, 0.279 and 0.287 of 512 on both
            # sides; without half of q in registers 0.255, without hold 1% slower. All heads at once
            # 0.262 against 0.266 with sections: neighbours share few keys.
            consumers, block_n, most = 3, 64, 4
            section, half_q = spec.batch * spec.nheads, True
    else:
        # q, out, and two blocks each of k and v, all 256 wide, would be 256 KiB.
        # Measured: full 632 and 651 against 453 and 453 with 32 keys a step and 4 stages.
        alias = widths == widths_v == (256,)
        consumers, block_n, most = 2, 64, 2 if alias else 3
    if spec.features.blocks is not None:
        block_n = gcd(block_n, spec.features.blocks.size_k)
    # As many blocks as fit, and one more of k if that does: 650 against 624 at d128 full, 16384.
    slots_q = consumers * 2 if max(total, total_v) <= 64 else consumers
    if alias and spec.varlen is None and not spec.features.mods:  # which are short of registers
        # The next q is loaded before out has left through q's memory. Measured: full 611, 669 and
        # 697 at 1024, 2048 and 4096 against 600, 641 and 671.
        slots_q += 1
    free = _HOPPER_SHARED - 128 * (total * slots_q + total_v * consumers * (not alias))
    stages = min(most, free // (2 * block_n * (total + total_v)))
    more = stages < most and free >= 2 * block_n * ((stages + 1) * total + stages * total_v)
    return HopperConfig(
        block_n,
        stages,
        stages + more,
        slots_q,
        consumers,
        dynamic=_draws(spec, target, consumers),
        section=section,
        widths=widths,
        widths_v=widths_v,
        # Measured with two warpgroups at 16384: 675 full, 660 causal at d128 against 650 and 630;
        # 712 against 694 at d256 causal. With three 521 and 504 against 533 and 513 at d64.
        hold=consumers == 2 or windows,
        # Measured at 16384: 708 against 687 at d256 causal; at d128 no difference. At d96, 4096 and
        # 8192, causal 1.11 and 1.08, full 1.03: without, warpgroups there fall into step.
        turns=(spec.causal and alias and spec.seqlen_q >= 4096) or total == total_v == 96,
        # More warpgroups have no registers for it. Wide heads have room for a part of it. Measured
        # with d256 causal at 16384: no difference; full 716 against 683.
        q_in_registers=windows or (consumers == 2 and (not spec.features.mods or half_q)),
        half_q=half_q,
        alias=alias,
        bounded=bounded(spec),
        kept=keeps(spec),
    )


def _draws(spec: AttentionSpec, target: Target, consumers: int) -> bool:
    """Whether programs of v3's forward draw their tiles from a counter, which they wait for.

    Measured: where programs have one tile each, causal 0.89 to 0.96 of the speed without, full
    0.93. Where they have several, causal 547 and 616 against 477 and 531 at d128; full 1.02, 1.01
    and 1.00 to 1.01 at 512, 1024 and longer at d128, 1.03 to 0.99 and 1.00 to 1.04 at d64, 1.02 at
    d256 from 8192 and 1.07 at d96. But 512 keys on both sides at d64 0.94; and d256 at 512 1.01 in
    one run and 0.82 in another, which is not understood. v wider than q spills with it.
    """
    if spec.varlen is not None:
        return True
    if spec.batch * spec.nheads * -(-spec.seqlen_q // (64 * consumers)) <= target.num_sms:
        return False
    if spec.causal or spec.features.blocks is not None:
        return True
    d, d_v = sum(widths_of(spec.headdim)), sum(widths_of(spec.headdim_v))
    short = d == 256 and spec.seqlen_q < 2048
    return "window" not in spec.features.uses and d_v <= d and not short


def widths_of(headdim: int) -> tuple[int, ...]:
    """The powers of two in which v3 loads a head dimension: 96 as 64 + 32, 192 as 128 + 64.

    A second part of less than 32 would cost about what it saves.
    """
    full = block_d(headdim)
    half = full // 2
    rest = max(32, block_d(headdim - half))
    return (half, rest) if full > 64 and rest < half else (full,)


def backward(spec: AttentionSpec, target: Target) -> HopperBackwardConfig:
    """v3's backward, on sm_90 alone. Measured at 512, 1024, 4096 and 16384."""
    config = _backward(spec, target)
    return replace(config, splits=_splits(spec, target, config))


def _backward(spec: AttentionSpec, target: Target) -> HopperBackwardConfig:
    # With deterministic=True a tile's programs add in the order of their keys. All start at the
    # last queries, one after the other; forwards each would begin where the one before it comes
    # last. Measured at 4096: 295, 380 and 228 against 198, 249 and 164 at d64, d128 and d256.
    uses = spec.features.uses
    backwards = spec.deterministic and (spec.causal or "window" in uses)
    d = widest(spec)
    if d <= 64 and spec.features.mods:
        # 128 queries leave registers for them only if dp is not there yet. What a derivative makes
        # of p is not p: then p must go before. Measured, as a part of plain's speed: softcap 0.76,
        # fused 0.80; not fenced, which spills, 0.75.
        return HopperBackwardConfig(
            128, 128, 64, 64, 2, 2, late_dp=True, late_dv="softcap" not in uses,
            fused="softcap" in uses and fuses(spec), fold=False, backwards=backwards,
        )  # fmt: skip
    plain = not uses and spec.varlen is None
    if d <= 64:
        if plain and _walks_whole_heads(spec, target):
            # Measured at 512: 351 full, 226 causal against 298 and 186 with a program a tile, 340
            # and 223 with `programs`. late_dp when full 315.
            late = spec.causal
            return HopperBackwardConfig(
                128, 128, 64, 64, 2, 2, late_dp=late, late_dv=not late, programs=target.num_sms,
                kv_stages=2, whole_heads=True,
            )  # fmt: skip
        if spec.deterministic:
            return HopperBackwardConfig(128, 128, 64, 64, 2, 2, backwards=backwards)
        # Measured with a program a tile: full 298, 390, 454, 491 and 527 at 512, 1024, 2048, 4096
        # and 16384; causal 186, 279, 374, 449 and 541. With as many as there are multiprocessors,
        # which begin a tile while they end another: full 340, 423, 477, 511 and 545; causal 216,
        # 302, 382, 441 and 393, with late_dp 223, 310, 394 and 451.
        programs = _programs(spec, target) if plain else 0
        kv_stages = 2 if programs else 1
        if spec.causal:
            # Measured with a program a tile: lag 273, 429 and 525 from 1024 on against 272, 407 and
            # 486, but 175 against 184 at 512; late_dv with it 264, 422 and 502; late_dp 279, 439
            # and 519.
            return HopperBackwardConfig(
                128, 128, 64, 64, 2, 2, late_dp=programs > 0, lag=spec.seqlen_q >= 1024,
                programs=programs, kv_stages=kv_stages,
            )  # fmt: skip
        # Measured: 308, 396, 493 and 522 against 300, 385, 481 and 516 with fold, 298, 373, 460
        # and 489 with neither lag nor late_dv. But packed, with a mask of keys, 447 against 433.
        # With both and release 484 against 465 at 2048, with release alone 460.
        return HopperBackwardConfig(
            128, 128, 64, 64, 2, 2, late_dv=True, fold=spec.varlen is not None, lag=True,
            both=plain, release=plain, programs=programs, kv_stages=kv_stages,
        )  # fmt: skip
    width, width_v = (96 if x <= 96 else 128 for x in (spec.headdim, spec.headdim_v))
    if d <= 128 and spec.features.mods:
        # Measured, ms at 8192 causal: softcap 2.97, ALiBi 2.60, a mask of documents 2.60 against
        # 3.01, 2.65 and 2.95 with dp begun before p; plain 2.71.
        # At the power limit as parts of plain's speed, in sections both: softcap 0.84, not fenced
        # 0.87, then fused 0.91; a user's soft sign 0.87, not fenced 0.93, as what a derivative
        # makes of p is multiplied beside the product dp; a bias by distance 0.94 and 0.98. ALiBi
        # 0.94, fused 1.00; not fenced 0.97.
        keys = tuple(mod.key for mod in spec.features.score_mods)
        return HopperBackwardConfig(
            64, 128, width, width_v, 2, 2, late_dp=True, fused=fuses(spec),
            fenced=keys in ((), ("alibi",)), backwards=backwards,
        )  # fmt: skip
    narrow = width == width_v == 96 and plain and not spec.deterministic
    if d <= 128 and plain and not narrow and _walks_whole_heads(spec, target):
        # Measured at 512: 261 against 225 with a program a tile; but 340 against 361 when full. At
        # d96 199 and 301 against 199 and 304; 221 and 339 with `programs`.
        return HopperBackwardConfig(
            64, 128, width, width_v, 2, 2, late_dv=True, programs=target.num_sms, whole_heads=True
        )
    if width == width_v == 128 and _finishes_windows(spec):
        # Measured, ms at 8192, window 1024: 0.769; with late_dp 0.795, folded as well 0.789, with
        # release, too, 0.777; with a kernel before and one behind 0.810. Sections, and programs
        # that walk several tiles, are 2 to 8% slower: then less of what neighbours read stays in
        # L2.
        ordered = HopperBackwardConfig(
            64, 128, 128, 128, 2, 2, late_dv=True, fold=False, ordered=True
        )
        if _splits(spec, target, ordered) == 1:
            return ordered
    if d <= 128:
        # Measured: late_dv 428, 552 and 576 against 428, 512 and 558 full; 315, 466 and 547 against
        # 306, 464 and 548 causal. Without fold, and with lag, up to 3% slower. 128 queries a step
        # do not fit the registers. late_dp causal 337 and 505 against 328 and 487 at 1024 and 4096;
        # full 360, 443 and 572 against 361, 443 and 597.
        # With release and no fold full 586 and 574 against 575 and 561 at 8192, 359 and 356 at 512;
        # release alone 573, no fold alone 550; causal 0.95 to 1.02 times as fast.
        # Measured at d96, full and causal: 489 and 421 at 4096, 497 and 479 at 16384, with lag 484
        # and 416, 510 and 504; with `programs`, and two tiles of k and v, 475 and 437, 492 and 331.
        # 96 filled up to 128: 438 and 378, 457 and 468.
        late = spec.causal and plain
        free = plain and not (spec.causal or spec.deterministic) and width == width_v == 128
        programs = _programs(spec, target) if narrow and spec.seqlen_q < 4096 else 0
        return HopperBackwardConfig(
            64, 128, width, width_v, 2, 2, late_dp=late, late_dv=not late, fold=not free,
            release=free, lag=narrow and spec.seqlen_q > 4096, backwards=backwards,
            programs=programs, kv_stages=2 if programs else 1,
        )  # fmt: skip
    # Measured at d256: 298, 386, 480 and 515 full, 200, 292, 428 and 501 causal, where v2's two
    # kernels have 158 to 198 and 85 to 180. Two blocks of a dout that is 256 wide do not fit.
    wide = 192 if max(spec.headdim, spec.headdim_v) <= 192 else 256
    width, width_v = (wide if x > 128 else 128 for x in (spec.headdim, spec.headdim_v))
    # Measured, ms at 8192 causal: softcap 6.27 against 6.46 with dp begun before p; ALiBi 5.93 and
    # 5.94, a mask of documents 7.49 and 7.26.
    # Measured at d192, full and causal: in halves 425 and 400 at 4096, 469 and 451 at 16384, else
    # 418 and 373, 430 and 423; filled up to 256, 360 and 330, 377 and 383. At (192, 128): ahead 422
    # and 380, 438 and 425, else 388 and 344, 408 and 387; filled up 340 and 313, 359 and 350. At
    # d192 three blocks of q leave one of dout, and ahead is 419 and 402, 444 and 452.
    ahead = plain and (width, width_v) == (192, 128)
    return HopperBackwardConfig(
        64, 64, width, width_v, 3 if ahead else 2, 1 if width_v == 256 else 2,
        late_dp="softcap" in uses, backwards=backwards, wide=True,
        halves=width == width_v == 192, ahead=ahead,
    )  # fmt: skip


def _walks_whole_heads(spec: AttentionSpec, target: Target) -> bool:
    """Whether programs of v3's backward walk whole heads.

    Sums of dq then are few, a program's own, and need neither zeros nor a kernel behind. Measured
    to pay while q, dout and sums of all programs stay in L2, or nearly: with 34 MB; with 67 MB only
    for head dimension 128, causal. A causal mask must show every query some of the first keys.
    """
    heads = spec.batch * spec.nheads_k
    d = 64 if widest(spec) <= 64 else 128
    in_flight = 8 * d * spec.seqlen_q * spec.group_size
    most = 2**19 if d == 128 and spec.causal else 2**18
    rounds = -(-heads // max(1, target.num_sms))
    even = heads >= 0.9 * rounds * target.num_sms
    return in_flight <= most and even and not (spec.causal and spec.seqlen_q > spec.seqlen_k)


def _finishes_windows(spec: AttentionSpec) -> bool:
    """Whether programs of v3's backward finish dq, each tile in the order of its keys, last first.

    Where a causal window is all there is, and every query sees a key: no other program stores its
    dq. Measured at 8192, times as fast: windows of 128 1.20, 256 1.16, 2048 1.03, 4096 0.99. Where
    keys come before the first query, their programs all begin at it, and wait for each other: 2048
    queries of 8192 keys, window 1024, 0.935.
    """
    features = spec.features
    return (
        widest(spec) <= 128
        and in_the_loop(spec) == ("window",)
        and spec.causal
        and features.window_left is not None
        and features.window_left <= 2048
        and spec.varlen is None
        and spec.seqlen_q == spec.seqlen_k
    )


def _programs(spec: AttentionSpec, target: Target) -> int:
    """How many programs of v3's backward share its tiles, 0 if each is to have one.

    They take tiles in turn. When causal these are of different lengths, which evens out if a
    program comes by every position in a head, and often enough.
    """
    programs = target.num_sms
    if spec.causal:
        if spec.batch * spec.nheads_k < 0.9 * programs:
            return 0
        while gcd(programs, -(-spec.seqlen_k // 128)) > 1:
            programs -= 1
    return programs


def _splits(spec: AttentionSpec, target: Target, config: HopperBackwardConfig) -> int:
    """How many programs of v3's backward share out a group's heads, for each tile of keys.

    One, but where so few tiles leave multiprocessors idle; the longest of a causal mask is twice
    the mean. Measured at d128 causal, 4096: 16 heads on one of keys 280, with two programs 454,
    with four 510, plain 519; on four, whose tiles are four for each multiprocessor, 505, with two
    475, with four 454.
    """
    if spec.group_size == 1 or config.whole_heads:
        return 1
    seqlen_k = spec.seqlen_k if spec.varlen is None else spec.varlen.rows_k
    tiles = spec.nheads_k * -(-seqlen_k // config.block_n)
    if spec.varlen is None:
        tiles *= spec.batch
    even = not spec.causal and spec.features.blocks is None and spec.varlen is None
    for splits in (x for x in range(1, spec.group_size) if spec.group_size % x == 0):
        rounds = tiles * splits / target.num_sms
        if rounds >= 0.85 * ceil(rounds) if even else rounds >= 3.5:
            return splits
    return spec.group_size


def backward_section(
    spec: AttentionSpec, target: Target, config: HopperBackwardConfig
) -> int | None:
    """Key heads whose tiles v3's backward takes together, place by place; None: head after head.

    Where tiles differ in length the last head's longest would else begin when most of the others
    are done. As many as give every multiprocessor a tile. Measured, causal, times as fast: d128
    1.01, 1.03 and 1.03 to 1.06 at 1024, 4096 and 8192; at 4096 d256 1.02, with four heads a key
    head 1.19, 1.11 and 1.09 at d128, d64 and d256. Where the longest may lie anywhere, eight tiles:
    documents as a block mask 1.056 with 16, 1.016 with 8, 1.03 with 32, where less stays in L2;
    packed 1.044.
    """
    features = spec.features
    if config.programs or spec.deterministic or features.window_left is not None:
        return None
    if spec.varlen is not None:
        tiles, each = spec.varlen.rows_k, 8
    elif features.blocks is not None:
        tiles, each = spec.seqlen_k, 8
    elif spec.causal:
        tiles, each = spec.seqlen_k, 1
    else:
        return None
    return max(1, each * target.num_sms // max(1, -(-tiles // config.block_n)))


def around_backward(spec: AttentionSpec, target: Target) -> TileConfig:
    """The kernels before and behind it, which are bound by memory and tiled like it."""
    return TileConfig(1, 1, 4, 1)


def _loads_scores(spec: AttentionSpec) -> bool:
    """Whether users' score modifications load from tensors."""
    return loads_modifications(replace(spec, features=replace(spec.features, mask_mod=None)))
