"""Keeps an object of its own in the run's folder of a bucket, beside checkpoints. Dies once, after
the third save."""

from __future__ import annotations

from pathlib import Path

from metaflow import S3, FlowSpec, checkpoint, current, retry, step
from telling import die, tell


class Buckets(FlowSpec):
    @retry(times=1, minutes_between_retries=0)
    @checkpoint
    @step
    def start(self):
        file = Path(current.checkpoint.directory, "count")
        loaded = int(file.read_text()) if current.checkpoint.is_loaded else 0
        with S3(run=self) as s3:
            kept = int(s3.get("count").text) if s3.get("count", return_missing=True).exists else 0
            tell(attempt=current.retry_count, loaded=loaded, kept=kept)
            for count in range(loaded + 1, 6):
                file.write_text(str(count))
                s3.put("count", str(count))
                current.checkpoint.save()
                if count == 3 and current.retry_count == 0:
                    die()
            tell(listed=len(current.checkpoint.list()), kept=int(s3.get("count").text))
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    Buckets()
