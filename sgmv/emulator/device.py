"""The GPUs that a launch is laid out for: how many blocks fit, how fast it can be at most.

Sources, for all figures below:
    SMs, bandwidth, fp16   NVIDIA's data sheets of A100 (SXM4, 80 GB), H100 (SXM5), H200 (SXM) and
                           L4; whitepaper "NVIDIA Ada GPU Architecture" for RTX 4090. fp16 is the
                           dense peak of the tensor cores with sums in float32: half of what the
                           sheets of H100, H200 and L4 print, which is with sparsity.
    per SM, per block      CUDA C++ Programming Guide, "Compute Capabilities", technical
                           specifications of 8.0 (A100), 8.9 (L4, RTX 4090), 9.0 (H100, H200).
    1 KiB per block        the same chapter: from 8.0 on the system takes that much of each block.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from sgmv.checks import check_count

KIB = 1024
RESERVED = 1 * KIB


@dataclass(frozen=True)
class Device:
    """One GPU, as far as a launch depends on it. Make your own for another.

    Semantics: what an SM holds at once is limited by shared memory, threads and blocks.

    sms                      streaming multiprocessors
    shared_memory_per_sm     bytes that its resident blocks share
    shared_memory_per_block  bytes that one block may ask for, opted in
    blocks_per_sm            resident blocks at most
    threads_per_sm           resident threads at most
    bandwidth                bytes per second of its memory
    fp16_peak                FLOP per second of its tensor cores, dense, sums in float32

    Registers are left out. A transcription of Punica's cooperative shrink, compiled by NVRTC and
    ptxas 12.9 for 8.0, 8.9 and 9.0, took 72 to 214 of them per thread: they allow at least as many
    blocks as its shared memory does, at each of its ranks, on every device here.
    Source: this file's head.

    >>> toy = Device("toy", 2, 100 * 1024, 99 * 1024, 16, 1536, 10**11, 10**13)
    >>> toy.resident_blocks(threads=128, shared_memory=40 * 1024)
    2
    """

    name: str
    sms: int
    shared_memory_per_sm: int
    shared_memory_per_block: int
    blocks_per_sm: int
    threads_per_sm: int
    bandwidth: int
    fp16_peak: int

    def __post_init__(self) -> None:
        for each in fields(self)[1:]:
            value = check_count(each.name, getattr(self, each.name), 1)
            object.__setattr__(self, each.name, value)

    def resident_blocks(self, threads: int, shared_memory: int) -> int:
        """Blocks of this many threads and bytes that one SM holds at once; 0: none fits.

        >>> A100.resident_blocks(128, 40 * 1024), A100.resident_blocks(128, 164 * 1024)
        (4, 0)
        """
        threads = check_count("threads", threads, 1)
        shared_memory = check_count("shared_memory", shared_memory, 0, 1e300)
        if shared_memory > self.shared_memory_per_block:
            return 0
        return min(
            self.blocks_per_sm,
            self.threads_per_sm // threads,
            self.shared_memory_per_sm // (shared_memory + RESERVED),
        )

    def roofline_s(self, flops: int, moved: int) -> float:
        """The least seconds that this many FLOP and bytes take.

        >>> A100.roofline_s(312 * 10**12, 0)
        1.0
        """
        flops, moved = (
            check_count(name, value, 0, 1e300)  # products of counts
            for name, value in (("flops", flops), ("moved", moved))
        )
        return max(flops / self.fp16_peak, moved / self.bandwidth)


GB, TFLOP = 10**9, 10**12

A100 = Device("A100", 108, 164 * KIB, 163 * KIB, 32, 2048, 2039 * GB, 312 * TFLOP)
H100 = Device("H100", 132, 228 * KIB, 227 * KIB, 32, 2048, 3350 * GB, 989 * TFLOP)
H200 = Device("H200", 132, 228 * KIB, 227 * KIB, 32, 2048, 4800 * GB, 989 * TFLOP)
L4 = Device("L4", 58, 100 * KIB, 99 * KIB, 24, 1536, 300 * GB, 121 * TFLOP)
RTX_4090 = Device("RTX 4090", 128, 100 * KIB, 99 * KIB, 24, 1536, 1008 * GB, 165 * TFLOP)

DEVICES = {device.name: device for device in (A100, H100, H200, L4, RTX_4090)}
