"""The console: a page that shows a run, while it goes on and afterwards. Reads only.

app       the routes: the page, its files, and what the page asks for
source    where that comes from: the run's folder (steps, dialogues) and Redis (who is there now)
static/   the page itself: plain modules that browsers load as they are, from this host alone
"""
