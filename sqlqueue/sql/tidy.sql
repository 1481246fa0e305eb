-- Keep partitions ahead, drop what is past the retention, remove leftovers; return what it did.
--
-- moves   nothing
-- index   the primary keys
-- locks   the parents of new and dropped partitions, for at most 50 ms of waiting
-- caller  upkeep
select sqlqueue.tidy() union all select sqlqueue.forget_keys()
