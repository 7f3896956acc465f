"""Random programs of users, on two ranks."""

import os

import pytest

from tests.distributed import jobs_programs

# More for a search by hand: GRADSURG_PROGRAMS=300.
COUNT = int(os.environ.get("GRADSURG_PROGRAMS", "30"))


@pytest.mark.parametrize("first", range(0, COUNT, 10))
def test_random_programs_on_two_ranks(ranks, first):
    ranks(2).run(jobs_programs.programs, first, 10)
