"""The kernels in Numba.

Design
------
A. `_plan` says how a tensor is cut, this package computes: `channels` (scalars), `points` (one vector), `rows` and
   `columns` (the sums of the two nests), `output`, and `kernel`, the loops over all that. `images` has a kernel of its
   own. Below are `vectors`, the `shares` of threads, the `job` and `buffers` that arguments become, and how functions
   become machine code: `compiler`, `parts`, `cache`, `prepare`. `fastbn_ext` has the same functions under the same
   names in files of these names; what does not depend on the values' dtype is in common.h there, since the others are
   compiled once for each. The files refer to this note by its letters.
B. Inner loops are written with the vectors of `vectors`; there is no fastmath, so every sum has one order and every
   result is bitwise reproducible. One subtraction and one fused multiply-add a value is all that a normalisation costs.
C. Statistics of a block are sums of deviations from `shift`, one of the block's own values, in float64. Its distance
   from the mean is at most sqrt(m2), so ``m2 = s2 - s1**2 / count`` loses at most log2(count) of 53 bits whatever the
   mean is, and a constant block gives exactly mean = shift, m2 = 0. There is no second pass and no division inside.
D. ``y = (x - high) * scale + low``: `high` is the mean rounded to x's dtype, so that the difference is exact where x is
   near the mean; `low` carries the bias and the mean's rounding error.
E. What is left of a row behind its last whole vector is loaded and stored by lanes. A vector that overlaps the one
   before it would touch a line that has just been streamed, which is read again from memory then, even where none of
   its lanes are stored (ns for 16 values on a thread: 32x64x55x55, training 7.2 to 5.3; 64x300x15x15 8.4 to 4.7).
F. Streamed output goes in whole lines; what lies before the first and behind the last of a row is stored by lanes. A
   stage in L1, which would let rows share lines, was tried: 1.25 copies for inference where this costs 1.0, because
   reads and writes no longer overlap.
G. Several rows are read at a time: one stream after the other leaves memory idle. Of channels it is `STREAMS`, whose
   sums stay in registers, and what is `AHEAD` of them is prefetched (32x256x56x56, Zen 3, statistics: 0.79 copies in
   one stream, 0.60 in four; sums of gradients: 1.56 and 1.17; in cache too: 8x64x56x56, training: 5.5 to 4.6 ns), in
   every line (float64, 32x64x56x56: in every other one training took 1.50 and inference 1.18 copies, now 1.38, 1.06). A
   row that is left over is four streams by itself (1x64x56x56, training: 6.1 to 5.0, backward 7.6 to 7.0 ns). Of
   rows of columns it is `COLUMN_STREAMS` (56x56x64 channels last, statistics: 0.7 copies in one stream, 0.53 in eight;
   sums of gradients: 1.5 and 1.05), an odd number of rows apart: whole pages apart, they would share their places in
   the nearest cache (Zen 4, ns for 16 values on a thread: 4096x256, training 4.35 to 4.2, backward 5.9 to 5.5).
   Prefetching helps sums of gradients from memory (65536x256, backward 12.3 to 11.6), and costs elsewhere.
H. The kernel is one or two phases, and a phase a loop over independent tasks: the only place with threads. To spare the
   compiler, one kernel serves all operations, its arguments are a `Job`, and each `part` is compiled by itself.
I. A run's output goes backwards, row by row, after its reduction: what was read last is still in the nearest cache.
   Split work goes forward: what the third-level cache might still have gains less than order does (65536x256, training:
   backwards 2.2 copies, forward 1.85; backward pass: 3.7 and 3.3).
   Meanwhile the same row of the next run is asked for where data come from memory, which would only be written to: it
   reads and writes at the same time (Zen 4, ns for 16 values on a thread: 32x512x28x28, training 7.6 to 6.5, backward
   11.8 to 10.5; 32x256x56x56, 5.7 to 5.2 and 9.6 to 8.4; 32x64x112x112, of which a channel does not fit the
   second-level cache, nothing; into the nearest cache too it costs up to 15 %). One channel's output in the same loop
   as the sums of the next was tried (Zen 3): 0 to 11 % less, and a second form of both loops. So was asking for the
   output's lines while sums are made, in the cache (Zen 4): nothing.
J. A sum takes a value as ``fma(value, one, sum)``, and values become float64 as they are loaded: on Zen, conversions
   share their units with additions but not with multiply-adds (Zen 3, sums of 16 values in cache: 1.96 to 1.35 ns, of
   gradients 4.4 to 1.97). A ReLU's mask is applied to what has been converted, in one instruction of AVX-512 (Zen 4, in
   cache, 8x64x56x56, sums of gradients 3.3 to 2.7 ns, in C 3.5 to 2.6; 4096x64, 4.8 to 3.6, 4.4 to 3.7). To compare x
   with a threshold of its channel instead of computing the output again was tried: 2.2 ns if x always grows with the
   output, 2.6 if it may fall, and a search for the exact threshold.
K. Coefficients stay in registers: rows of neighbouring channels are written as one, and a vector that two of them
   share takes lanes from both. They were loaded for every column (inference in cache: 32x256x13x13 4.5 to 2.2 ns for 16
   values on a thread, 8x64x56x56 3.2 to 2.1), and sums kept for every column of short rows (training 8.2 to 5.5 ns).
L. Every thread has a share of a phase's tasks, neighbours in memory and the same in each call, as its caches know them.
   Who is done goes on with tasks that others have not begun: a core is slower where another process or machine has a
   part of it, or where it is of another kind, and a thread that has to wake up begins late (Zen 4, 2 threads with
   neighbours on their cores, ns for 16 values on a thread: 8x64x56x56, training 5.8 to 5.2, inference 2.4 to 2.1;
   32x1280x7x7, backward 9.4 to 8.8; 32x2048x7x7, inference 4.1 to 3.8; with none 0 to 10 % less; the counting itself
   takes nothing that could be measured). Between two dies, what is taken over comes from far: 0 to 9 % more in cache.
   To leave each thread its last task was tried: it gains nothing then where there is one die.
"""
