"""What is asked for, as a sequence of searches within one budget of passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tome.tune.search import Problem, R, best_shape, fastest, improved, in_time


class Hunt:
    """Searches of one problem with one budget."""

    def __init__(self, problem: Problem, passes: float) -> None:
        self.problem, self.passes = problem, passes
        self.is_in_reach = True  # whether anything does what was asked for

    def in_time(self, seconds: float) -> R:
        """The best that takes no longer; what is fastest, where nothing is so fast."""
        nothing = (0,) * self.problem.depth
        if self.problem.seconds(nothing) <= seconds:  # on a GPU the kernels alone may do
            return nothing
        r = best_shape(self.problem, seconds)
        if r is None:
            self.is_in_reach = False
            return fastest(self.problem)
        return improved(self.problem, r, seconds, 0.9 * self.passes)

    def again(self, r: R, seconds: float) -> R:
        """Such a one for a time that is a little different."""
        near = in_time(self.problem, r, seconds) if any(r) else None
        if near is None:
            return self.in_time(seconds)
        return improved(self.problem, near, seconds, self.problem.work() + 0.05 * self.passes)

    def within(self, is_allowed: Callable[[R], bool]) -> R:
        """The fastest that is allowed; what does least harm, where nothing is that merges at all."""
        problem = self.problem
        slow, fast = problem.seconds((0,) * problem.depth), problem.seconds(fastest(problem))
        shape: R | None = best_shape(problem, (slow * fast) ** 0.5)
        best: R | None = None
        while shape is not None:
            found = self._most(shape, slow, fast, is_allowed)
            if found is None or (best is not None and problem.seconds(found) > 0.998 * problem.seconds(best)):
                break
            best = found
            if problem.work() > 0.9 * self.passes:
                break
            until = problem.work() + 0.3 * self.passes
            shape = improved(problem, best, problem.seconds(best), min(until, 0.9 * self.passes))
        if best is None:
            self.is_in_reach = False
            gentle = in_time(problem, [1.0] * problem.depth, slow - (slow - fast) / 50)
            return gentle or (0,) * problem.depth
        return best

    def _most(self, shape: Sequence[float], slow: float, fast: float, is_allowed: Callable[[R], bool]) -> R | None:
        """The fastest multiple of a shape that is allowed."""
        best = None
        for _ in range(8):
            middle = (slow * fast) ** 0.5
            r = in_time(self.problem, shape, middle)
            if r is not None and any(r) and is_allowed(r):
                best, slow = r, middle
            else:
                fast = middle
        return best
