"""The grader: is this final answer mathematically equal to the gold answer? An HTTP service of its own.

Map: `answer` takes the final answer out of a response; `normalise` brings LaTeX and plain text to one spelling.
`equivalence` compares, cheapest layer first, with `readings` (numbers, lists, names), `notations` (dates, times,
bases, residues), `units`, `real_sets` (intervals and inequalities), `numeric` (written numbers) and, for all else,
`expression` (math-verify's LaTeX parser, equality by value) over `evaluation` (that value, by mpmath).
`worker_process` is the child that runs `equivalence`; `pool` owns those children and their deadlines (`frames`: what
they say to each other); `judge` puts extraction, cache and pool together. `protocol` holds the HTTP bodies, `problems`
the errors; `guards` stand before every route (token, size, headers); `app` is the FastAPI application, `trainers` the
routes of other projects' trainers, `page` what a person sees at /, for which `explain` draws both sides; `__main__`
starts it. `client` is how other programs ask, rollout among them; it needs none of the grader's libraries. Nothing
here knows of training, and nothing imports torch.
"""
