"""Plans: a decode step sized for a TPU pod that is not here, compiled for it, and what the compiled program says.

- What is asked for: `plan_flags` (flags), `pod_settings` (what they make).
- What fits: `sizing` (by count), `step_weights` (the weights' part), `fitting` (tried with kernel and compiler).
- The program: `absent_chips` (what to compile for), `pod_step` (the step, built and compiled).
- What the program says: `hlo_text` (reads its text), `pool_copies` (finds copies of page pools), `step_facts` (memory,
  collectives, kernels), `step_floor` (the least time of a step).
- The end: `plan_text` (text). Beside it `jax_kernel`: JAX's own paged attention, to compare with.
"""
