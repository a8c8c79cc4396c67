"""Where Sprint hears of blocks: each module turns one kind of input into sightings."""
