"""Files in, one particle table out; and back.

In the order in which a set goes through it: ``star`` and ``mrc`` (files), ``readers`` (any dialect to one table),
``particles`` (the table), ``inputs`` (at the poses asked for, with mask and grid), ``split`` (who trains), ``observe``
and ``stacks`` (one particle as numerator and weight), ``noise`` (what a Fourier voxel is worth), ``cache`` and
``filling`` (rows on disk), ``batches``; ``poses`` moves them.  Beside that way: ``check`` and ``checks`` (is this set
what it seems), ``lists``, ``extract``, ``convert``, ``combine``, ``cubes``, ``subtomograms`` (from and for other
programs), ``symmetry`` (copies).  The way back: ``export``, ``places``, ``mapback``.  Under all: ``atomic`` (how files
are written), ``tensors`` and ``pickles`` (archives, read without running what is in them).
"""
