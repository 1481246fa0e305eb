-- Keep partitions ahead, drop those past the retention, remove leftovers; return what it dropped.
--
-- moves   nothing
-- index   the primary keys
-- locks   the parents of new and dropped partitions, for at most 50 ms of waiting
-- caller  upkeep
select sqlqueue.tidy()
