//! `bradley usage`: shows the work that was done for each owner.

use super::args::{Output, UsageArgs};
use super::failure::Outcome;
use super::output::{self, human};
use super::remote::connect;
use crate::rpc::pb;

pub(super) async fn run(args: UsageArgs, output_format: Output) -> Outcome {
    let client = connect(&args.server.target()).await?;
    let request = pb::GetUsageRequest {
        owner: args.owner.unwrap_or_default(),
        start_date: args.from.unwrap_or_default(),
        end_date: args.to.unwrap_or_default(),
        by_day: args.by_day,
    };
    let answer = client.usage().get_usage(request).await?.into_inner();
    let rows = answer.usage.iter().map(|u| {
        let owner = match u.owner.as_str() {
            // Without tokens nobody has a name.
            "" => "-",
            owner => owner,
        };
        let day = args.by_day.then(|| u.date.clone());
        let numbers = [
            u.scored_pairs.to_string(),
            u.scored_completions.to_string(),
            u.scored_tokens.to_string(),
            human::seconds(u.training_device_seconds),
        ];
        let named = [owner.to_owned()].into_iter().chain(day);
        named.chain(numbers).collect::<Vec<String>>()
    });
    let json = answer.usage.iter().map(|u| {
        serde_json::json!({
            "owner": u.owner,
            "from": if u.date.is_empty() { &answer.start_date } else { &u.date },
            "to": if u.date.is_empty() { &answer.end_date } else { &u.date },
            "scored_pairs": u.scored_pairs,
            "scored_completions": u.scored_completions,
            "scored_tokens": u.scored_tokens,
            "training_device_seconds": u.training_device_seconds,
        })
    });
    let numbers = ["pairs", "completions", "tokens", "device time"];
    let day = args.by_day.then_some("day");
    let header: Vec<&str> = ["owner"].into_iter().chain(day).chain(numbers).collect();
    if output_format == Output::Table {
        // A column for both days would be too wide for a terminal.
        output::line(&format!(
            "{} to {} (UTC)",
            answer.start_date, answer.end_date
        ));
    }
    output::list(output_format, &header, rows.collect(), json.collect());
    Ok(())
}
