-- Keep lines that runs have said.
--
-- moves   nothing
-- index   log_pkey
-- locks   nothing
-- caller  upkeep; Worker, when it ends
select sqlqueue.keep_lines(cast(:lines as json))
