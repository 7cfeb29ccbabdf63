"""
Search spaces: from an Optuna trial to constructor arguments, and from a stored trial back to a hyperparameter file's values.

A study stores what was *suggested*, not what the model got. So each sampler only suggests, and its result is what the
algorithm's converter makes of the suggestions: the search and `--trial-id` cannot disagree. Only the noise has two forms,
an object in the search and ``noise_type`` and ``noise_std`` in a file.

Whatever is sampled here replaces the environment's entry in the hyperparameter file; an option that would contradict it
or make it void is set back to its default at the same time. ``exploration_noise``, ``warmup`` and ``parameter_noise`` of the
file stay: where there is such noise, none is sampled. Samplers see the file's values in `searched`.

``rl_zoo3`` is imported inside the functions: it may be the one that is importing this package.
"""
