-- Take the unique keys of jobs that are to be enqueued; say which job holds each, new or old.
--
-- moves   scheduled -> run, waiting -> run, ready -> run
-- index   unique_claim_pkey
-- locks   the claims; waits for strangers that are taking them for at most 1 s, then says null
-- caller  Queue, before it enqueues
select cast(sqlqueue.take_keys(
    cast(:keys as text[]), cast(:ids as uuid[]), :on_conflict, :until_started,
    cast(:period as interval), cast(:delay as interval), cast(:longest as interval)
) as text[])
