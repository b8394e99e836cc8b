"""The `multiattempt` command and the local launcher.

__main__    arguments, and which command they mean
preflight   everything that can be known to be wrong before anything starts
launcher    one run, in order
supervisor  processes: kept alive, stopped, none left behind
store       the embedded Valkey of a run, kept alive
services    what each process is called with: command, environment, readiness
watchdog    stops what the launcher started should the launcher itself be killed
progress    what the user sees while it runs
evaluate    starts what an evaluation needs, or asks running replicas; eval_arguments, model_source: what is meant
prepare     a run made ready for services that others start (containers)
status      a look at a run from outside
doctor      is this machine fit to run it, and what to do if not
"""
