"""What goes where and in which order: sources, the plan, the runner, the targets and the proof."""
