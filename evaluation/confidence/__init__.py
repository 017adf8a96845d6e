"""What a drafter's confidence head is worth: its calibration, temperatures that mend it, what scheduling gains."""
