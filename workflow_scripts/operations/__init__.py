"""What an operator does with a run: plan, status, verify, gc."""
