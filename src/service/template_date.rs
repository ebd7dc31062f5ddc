//! Date that chat templates see.

use jiff::Timestamp;
use jiff::civil::{self, Date, DateTime};
use jiff::tz::TimeZone;

use crate::domain::job::Job;

/// The server's setting `template_date`; `None` means the current date.
#[derive(Clone, Copy, Debug)]
pub(super) struct TemplateDate(pub Option<Date>);

impl TemplateDate {
    /// Returns the date and time, in UTC, that chat templates see. For a job and its checkpoints it
    /// is the creation time of the job, so that a resumed job has the same tokens and scores do not
    /// change from day to day. Without a job it is the server's `template_date`, or now.
    pub fn of(self, job: Option<&Job>) -> DateTime {
        let in_utc = |time: Timestamp| time.to_zoned(TimeZone::UTC).datetime();
        match (job, self.0) {
            (Some(job), _) => {
                in_utc(Timestamp::from_millisecond(job.create_time).unwrap_or_default())
            }
            (None, Some(date)) => date.to_datetime(civil::Time::midnight()),
            (None, None) => in_utc(Timestamp::now()),
        }
    }
}
