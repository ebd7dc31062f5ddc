//! `bradley chat`: a conversation with a policy, or with two beside each other.
//!
//! The server stores nothing of a conversation: each message is sent with everything before it. If
//! that has become too long for a prompt, the oldest turns are left out, and a note names them.

mod command;
mod conversation;
mod editor;
mod input;
mod view;

use std::cell::{Cell, RefCell};
use std::io::IsTerminal as _;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::command::{ChatCommand, ChatEntry, HELP};
use self::conversation::{ChatTurn, Conversation, append};
use self::editor::{ChatLine, FatalSignals, NOT_UTF8, leave};
use self::input::ChatInput;
use self::view::{AnswerView, Side};
use super::args::{ChatArgs, Output};
use super::failure::{Failure, Outcome};
use super::generate::{
    GenerationFailure, SampleStream, Samples, begin, finish_reason, printable, request, shown,
};
use super::output::table::terminal_width;
use super::output::{self, say_wrapped};
use super::policy_names::PolicyNames;
use super::progress::{WorkProgress, say};
use super::remote::connect;
use crate::rpc::client::{Client, Status, field_violations};
use crate::rpc::pb;

/// Exit code after Ctrl-C, as shells have it.
const EXIT_INTERRUPTED: i32 = 130;

/// Time in which a second Ctrl-C at the prompt ends the conversation, and the text after the first
/// one. The first may have been meant for an answer that had just ended.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);
const LEAVE_HINT: &str =
    "Ctrl-C again within 2 seconds ends the conversation, as /quit and Ctrl-D do";

/// Added to the reason why an answer ended too early.
const KEPT_PART: &str =
    "the conversation goes on with the part of the answer that came, /retry asks again";

/// Fields of a request that the server refuses if the prompt, or the prompt with the longest
/// answer, is too long.
const LENGTH_FIELDS: [&str; 2] = ["prompt", "max_tokens"];

pub(super) async fn run(args: ChatArgs, format: Output) -> Outcome {
    check(&args, format)?;
    let base = request(&args.form, &args.sampling, 1)?;
    let client = connect(&args.server.target()).await?;
    let names = PolicyNames::of(&client).await?;
    let policy = names.complete("--policy", &args.policy).await?;
    let beside = match &args.beside {
        Some(beside) => Some(names.complete("--beside", beside).await?),
        None => None,
    };
    let interrupts = signal(SignalKind::interrupt())
        .map_err(|e| Failure::Failed(format!("Ctrl-C cannot be handled: {e}")))?;
    let mut conversation = Conversation::default();
    conversation.system.clone_from(&args.form.system);
    let mut session = ChatSession {
        client,
        base: pb::GenerateCompletionsRequest {
            policy,
            logprobs: false,
            ..base
        },
        beside,
        conversation,
        seed: args.sampling.seed,
        unanswered: None,
        is_terminal: std::io::stdin().is_terminal(),
        format,
    };
    let input = ChatInput::new(session.is_terminal && std::io::stderr().is_terminal());
    if input.has_editor() {
        let fatal = FatalSignals::take()
            .map_err(|e| Failure::Failed(format!("signals cannot be handled: {e}")))?;
        tokio::spawn(fatal.end_process());
    }
    session.run(input, interrupts).await
}

/// Refuses arguments that have no meaning for a conversation.
fn check(args: &ChatArgs, format: Output) -> Outcome {
    if args.form.plain {
        return Err(Failure::Usage(
            "--plain: a conversation has messages, which the chat template renders: leave it out, \
             or continue a text with bradley generate --plain"
                .to_owned(),
        ));
    }
    match format {
        Output::Csv => Err(Failure::Usage(
            "--format csv: the answers of a conversation come one by one, so that they have no \
             table: use --format json or yaml"
                .to_owned(),
        )),
        Output::Table | Output::Json | Output::Yaml => Ok(()),
    }
}

/// A message is asked for the first time, or once more in place of its answer.
#[derive(Clone, Copy, PartialEq)]
enum ChatAttempt {
    First,
    Repeated,
}

/// A conversation and its settings.
struct ChatSession {
    client: Client,
    /// The request of every message, without its prompt and its seed.
    base: pb::GenerateCompletionsRequest,
    /// The policy that also answers, beside the one of `base`.
    beside: Option<String>,
    conversation: Conversation,
    /// Seed of the next answer; `None` means a random one.
    seed: Option<u64>,
    /// The last message, if its answer failed or was stopped before it began.
    unanswered: Option<String>,
    /// True if a person types the messages. Errors then do not end the conversation.
    is_terminal: bool,
    format: Output,
}

/// The complete answers to a message: of the policy, and of the one beside it.
type ChatAnswers = (Samples, Option<Samples>);

impl ChatSession {
    /// Answers the lines of standard input until it ends.
    async fn run(&mut self, mut input: ChatInput, mut interrupts: Signal) -> Outcome {
        self.tell(&self.greeting());
        loop {
            let Some(line) = self.next_message(&mut input, &mut interrupts).await? else {
                if input.is_line_open() {
                    // Ctrl-D leaves the cursor behind the prompt.
                    self.tell("");
                }
                return Ok(());
            };
            match self.take(line, &mut interrupts).await {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return Ok(()),
                Err(failure @ Failure::Interrupted(_)) => return Err(failure),
                Err(failure) if self.is_terminal => {
                    say_wrapped(&format!("error: {}", printable(failure.message())));
                }
                Err(failure) => {
                    let place = format!("standard input, line {}", input.lines());
                    return Err(failure.with_context(&place));
                }
            }
        }
    }

    /// Reads the next message; `None` at the end of the input. Ctrl-C ends the process, at a
    /// terminal only if it is pressed twice.
    async fn next_message(
        &self,
        input: &mut ChatInput,
        interrupts: &mut Signal,
    ) -> Result<Option<Vec<u8>>, Failure> {
        let mut last_interrupt: Option<Instant> = None;
        loop {
            tokio::select! {
                line = input.message() => match line? {
                    ChatLine::Text(line) => return Ok(Some(line)),
                    ChatLine::End => return Ok(None),
                    ChatLine::Refused(reason) => {
                        say_wrapped(&format!("error: {reason}"));
                        continue;
                    }
                    ChatLine::Interrupt => {}
                },
                _ = interrupts.recv() => {}
            }
            if input.is_line_open() {
                self.tell("");
            }
            let is_second = last_interrupt.is_some_and(|at| at.elapsed() < LEAVE_WITHIN);
            if !self.is_terminal || is_second {
                // The thread that reads standard input cannot be stopped, and the end of the async
                // runtime would wait for it.
                leave(EXIT_INTERRUPTED);
            }
            last_interrupt = Some(Instant::now());
            input.discard();
            self.tell(LEAVE_HINT);
        }
    }

    /// Prints a line for a person at a terminal.
    fn tell(&self, text: &str) {
        if self.is_terminal {
            say_wrapped(text);
        }
    }

    fn greeting(&self) -> String {
        let policy = &self.base.policy;
        let who = match &self.beside {
            Some(beside) => format!(
                "{policy} and {beside} answer the same messages; the conversation goes on with \
                 the answers of the first."
            ),
            None => format!("{policy} answers."),
        };
        format!("{who}\n/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends.")
    }

    /// Does what a line asks for: answers a message, or runs a command.
    async fn take(
        &mut self,
        line: Vec<u8>,
        interrupts: &mut Signal,
    ) -> Result<ControlFlow<()>, Failure> {
        let line = String::from_utf8(line).map_err(|_| Failure::Failed(NOT_UTF8.to_owned()))?;
        match command::parse(&line).map_err(Failure::Usage)? {
            ChatEntry::Nothing => {}
            ChatEntry::Message(text) => self.ask_new(text, interrupts).await?,
            ChatEntry::Command(ChatCommand::Retry) => self.ask_again(interrupts).await?,
            ChatEntry::Command(ChatCommand::Quit) => return Ok(ControlFlow::Break(())),
            ChatEntry::Command(ChatCommand::Help) => say(HELP),
            ChatEntry::Command(ChatCommand::Reset) => {
                self.conversation.reset();
                self.unanswered = None;
                self.tell("the conversation begins anew");
            }
            ChatEntry::Command(ChatCommand::System(text)) => {
                self.tell(match text {
                    Some(_) => "the next messages have this system message",
                    None => "the next messages have no system message",
                });
                self.conversation.system = text;
            }
            ChatEntry::Command(ChatCommand::Seed(seed)) => {
                self.seed = seed;
                self.tell(&match seed {
                    Some(seed) => format!("the next answer has the seed {seed}"),
                    None => "the seeds are random".to_owned(),
                });
            }
            ChatEntry::Command(ChatCommand::Save(file)) => self.save(&file)?,
        }
        Ok(ControlFlow::Continue(()))
    }

    fn save(&self, file: &Path) -> Outcome {
        if self.conversation.len() == 0 {
            return Err(Failure::Usage(
                "/save: the conversation is empty: send a message first".to_owned(),
            ));
        }
        let row = self.conversation.row(&self.base);
        append(file, &row.to_string())
            .map_err(|e| Failure::Failed(format!("/save {}: {e}", file.display())))?;
        self.tell(&format!("appended to {}", file.display()));
        Ok(())
    }

    /// Asks a message that has no answer yet. If the answer ends too early, the failure says so.
    async fn ask_new(&mut self, user: String, interrupts: &mut Signal) -> Outcome {
        let turns = self.conversation.len();
        let asked = self.ask(user, ChatAttempt::First, interrupts).await;
        let has_part = self.is_terminal && self.conversation.len() > turns;
        asked.map_err(|failure| match has_part {
            true => failure.with_remark(KEPT_PART),
            false => failure,
        })
    }

    /// Asks the last message again, in place of its answer. If there is no new answer, the old one
    /// stays.
    async fn ask_again(&mut self, interrupts: &mut Signal) -> Outcome {
        if let Some(user) = self.unanswered.clone() {
            return self.ask_new(user, interrupts).await;
        }
        let left_out = self.conversation.left_out();
        let Some(old) = self.conversation.remove_last() else {
            return Err(Failure::Usage(
                "/retry: there is no message yet: send one first".to_owned(),
            ));
        };
        let (turns, seed) = (self.conversation.len(), self.seed);
        let asked = self
            .ask(old.user.clone(), ChatAttempt::Repeated, interrupts)
            .await;
        if asked.is_err() && self.conversation.len() > turns {
            self.conversation.remove_last();
            self.seed = seed;
        }
        if self.conversation.len() == turns {
            self.conversation.add(old, left_out);
            self.unanswered = None;
        }
        asked
    }

    /// Gets and shows the answers to a message, and adds them to the conversation, also the part
    /// that came before a failure.
    async fn ask(
        &mut self,
        user: String,
        attempt: ChatAttempt,
        interrupts: &mut Signal,
    ) -> Outcome {
        let view = RefCell::new(self.view());
        let seed = self.seed.unwrap_or_else(rand::random);
        let left_out = Cell::new(self.conversation.left_out());
        let progress = WorkProgress::of_task("generating");
        let answering = self.answer((user.as_str(), seed), &left_out, &view, &progress);
        let ended = tokio::select! {
            ended = progress.during(answering) => Some(ended),
            // The streams are dropped, which ends the server's work.
            _ = interrupts.recv() => None,
        };
        drop(progress);
        let mut view = view.into_inner();
        view.finish()?;
        let answers = match ended {
            Some(Ok(answers)) => Some(answers),
            Some(Err(failure)) => {
                match view.text(Side::Left) {
                    "" => self.unanswered = Some(user),
                    part => {
                        // Otherwise the conversation does not go on with it.
                        if self.is_terminal && attempt == ChatAttempt::First {
                            self.print_item((user.as_str(), seed), &view, None)?;
                        }
                        self.add(part.to_owned(), user, seed, left_out.get());
                    }
                }
                return Err(failure);
            }
            None if !self.is_terminal => {
                return Err(Failure::Interrupted("interrupted".to_owned()));
            }
            None => None,
        };
        let answer = view.text(Side::Left);
        if answers.is_none() && answer.is_empty() {
            self.tell("stopped before the answer began; /retry asks again");
            self.unanswered = Some(user);
            return Ok(());
        }
        self.print_item((user.as_str(), seed), &view, answers.as_ref())?;
        match &answers {
            Some((left, right)) => {
                self.note_cut(&self.base.policy, left);
                if let Some((right, policy)) = right.as_ref().zip(self.beside.as_ref()) {
                    self.note_cut(policy, right);
                }
            }
            None => self.tell(
                "stopped; the conversation goes on with this part of the answer, /retry asks again",
            ),
        }
        self.add(answer.to_owned(), user, seed, left_out.get());
        Ok(())
    }

    /// Adds an answer, or a part of it, to the conversation.
    fn add(&mut self, answer: String, user: String, seed: u64, left_out: usize) {
        let turn = ChatTurn { user, answer, seed };
        self.conversation.add(turn, left_out);
        self.unanswered = None;
        self.seed = self.seed.map(|seed| seed.wrapping_add(1));
    }

    /// Says that the answer of a policy is cut off, if it is.
    fn note_cut(&self, policy: &str, samples: &Samples) {
        if !is_cut(samples) {
            return;
        }
        let of = match &self.beside {
            Some(_) => format!(" of {policy}"),
            None => String::new(),
        };
        let tokens = samples.usage.completion_tokens;
        say_wrapped(&format!(
            "note: the answer{of} is cut off after {tokens} tokens (--max-tokens)"
        ));
    }

    /// Returns the way in which the next answers are shown.
    fn view(&self) -> AnswerView {
        match (self.format, &self.beside) {
            (Output::Table, None) => AnswerView::single(),
            (Output::Table, Some(beside)) => {
                let names = [self.base.policy.as_str(), beside.as_str()];
                AnswerView::pair(names, terminal_width())
            }
            _ => AnswerView::hidden(),
        }
    }

    /// Prints a turn for programs; people have seen its answers while they came. `answers` are its
    /// complete answers; `None` if it was stopped or has failed.
    fn print_item(
        &self,
        asked: (&str, u64),
        view: &AnswerView,
        answers: Option<&ChatAnswers>,
    ) -> Outcome {
        match self.format {
            Output::Table => Ok(()),
            format => {
                let item = self.item(asked, view, answers);
                output::write(shown(&output::stream_item(format, &item)).as_bytes())
            }
        }
    }

    /// Returns a turn for programs. `answers` are its complete answers; `None` if it was stopped or
    /// has failed.
    fn item(
        &self,
        (user, seed): (&str, u64),
        view: &AnswerView,
        answers: Option<&ChatAnswers>,
    ) -> Value {
        let part = |side: Side, policy: &str, samples: Option<&Samples>| {
            let ended = samples.and_then(|samples| samples.samples.first());
            json!({
                "answer": view.text(side),
                "finish_reason": ended.and_then(|sample| finish_reason(sample.finish_reason)),
                "prompt_tokens": samples.map(|samples| samples.usage.prompt_tokens),
                "tokens": samples.map(|samples| samples.usage.completion_tokens),
                "policy": samples.map_or(policy, |samples| samples.policy_version.as_str()),
            })
        };
        let left = answers.map(|(left, _)| left);
        let right = answers.and_then(|(_, right)| right.as_ref());
        let mut item = json!({"message": user, "seed": seed});
        if let (Value::Object(item), Value::Object(answer)) =
            (&mut item, part(Side::Left, &self.base.policy, left))
        {
            item.extend(answer);
        }
        if let Some(beside) = &self.beside {
            item["beside"] = part(Side::Right, beside, right);
        }
        item
    }

    /// Gets the answers to a message. `left_out` is the number of turns that the prompt leaves out;
    /// it grows as long as the prompt is too long.
    async fn answer(
        &self,
        (user, seed): (&str, u64),
        left_out: &Cell<usize>,
        view: &RefCell<AnswerView>,
        progress: &WorkProgress,
    ) -> Result<ChatAnswers, Failure> {
        let (left, right) = self.begin((user, seed), left_out).await?;
        if let Some(note) = self.conversation.note(left_out.get()) {
            progress.suspend(|| say_wrapped(&note));
        }
        let add = |side: Side, text: &str| {
            progress.end();
            view.borrow_mut().add(side, text)
        };
        let end = |side: Side| {
            progress.end();
            let ended = view.borrow_mut().end(side);
            ended.map_err(GenerationFailure::Output)
        };
        let left = async {
            let samples = left.read(|_, text| add(Side::Left, text)).await?;
            end(Side::Left)?;
            Ok::<_, GenerationFailure>(samples)
        };
        let right = async {
            let Some(right) = right else {
                return Ok(None);
            };
            let samples = right.read(|_, text| add(Side::Right, text)).await?;
            end(Side::Right)?;
            Ok::<_, GenerationFailure>(Some(samples))
        };
        Ok(tokio::try_join!(left, right)?)
    }

    /// Sends a message to both policies with the conversation before it, without its oldest turns
    /// if the prompt is too long with them. If the message alone is refused, too, the refusal is
    /// returned.
    async fn begin(
        &self,
        (user, seed): (&str, u64),
        left_out: &Cell<usize>,
    ) -> Result<(SampleStream, Option<SampleStream>), Failure> {
        loop {
            let request = pb::GenerateCompletionsRequest {
                prompt: Some(self.conversation.prompt(left_out.get(), user)),
                seed: Some(seed),
                ..self.base.clone()
            };
            let left = begin(&self.client, request.clone());
            let right = async {
                let Some(policy) = &self.beside else {
                    return Ok(None);
                };
                let request = pb::GenerateCompletionsRequest {
                    policy: policy.clone(),
                    ..request.clone()
                };
                begin(&self.client, request).await.map(Some)
            };
            match tokio::try_join!(left, right) {
                Ok(begun) => return Ok(begun),
                Err(GenerationFailure::Refused(status))
                    if is_too_long(&status) && left_out.get() < self.conversation.len() =>
                {
                    left_out.set(left_out.get() + 1);
                }
                Err(failure) => return Err(failure.into()),
            }
        }
    }
}

/// Returns true if a shorter prompt may be accepted. Other reasons have the same fields.
fn is_too_long(status: &Status) -> bool {
    field_violations(status)
        .iter()
        .any(|(field, _)| LENGTH_FIELDS.contains(&field.as_str()))
}

/// Returns true if the answer has as many tokens as it may have.
fn is_cut(samples: &Samples) -> bool {
    let cut = Some(pb::FinishReason::Length as i32);
    samples.samples.iter().any(|s| s.finish_reason == cut)
}
