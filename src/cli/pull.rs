//! Pulling an image with something to look at: a bar on a terminal, lines otherwise.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use crossbeam_channel::{select, Receiver, Sender};
use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::signal::Signal;

use super::client::{Client, FOREVER};
use super::failure::{one_line, CallError, During, Failure, Outcome};
use super::flags::Credentials;
use super::interrupt;
use super::table::{short_id, size};
use crate::api::admin::{LayerProgress, PullProgress, PullRequest};
use crate::api::runtime::PullImageRequest;

/// Pulls `image` and gives its id. A signal abandons the call, which makes the daemon give up the pull.
pub fn pull(client: &Client, image: &str, credentials: Option<&Credentials>, signals: &Receiver<Signal>) -> Outcome<String> {
    let (sender, messages) = crossbeam_channel::unbounded();
    let (client, name, credentials) = (client.clone(), image.to_owned(), credentials.cloned());
    // A call cannot be waited for together with a signal, so it waits on a thread of its own.
    crate::sys::thread::spawn("pull", move || ask(&client, &name, credentials.as_ref(), &sender))?;
    let mut view = View::new(image);
    let mut id = String::new();
    loop {
        select! {
            recv(messages) -> message => match message {
                Ok(Ok(progress)) => {
                    view.show(&progress);
                    id = progress.image_ref;
                }
                Ok(Err(error)) => return Err(error).during(|| format!("pull {image}")),
                Err(_) if id.is_empty() => return Err(Failure::failed(format!("pull {image}: the daemon did not name the image's id"))),
                Err(_) => return Ok(id),
            },
            recv(signals) -> signal => return Err(Failure::Silent(signal.map_or(1, interrupt::exit_code))),
        }
    }
}

/// Pulls with progress, or without where there is no admin service.
fn ask(client: &Client, image: &str, credentials: Option<&Credentials>, sender: &Sender<Result<PullProgress, CallError>>) {
    let mut request = PullRequest::new();
    request.image = image.to_owned();
    if let Some(credentials) = credentials {
        request.username.clone_from(&credentials.username);
        request.password.clone_from(&credentials.password);
    }
    let messages = match client.admin().pull_image(&request, FOREVER) {
        Ok(messages) => messages,
        Err(error) => return drop(sender.send(Err(error))),
    };
    for message in messages {
        if message.as_ref().is_err_and(CallError::is_unimplemented) {
            return drop(sender.send(ask_plainly(client, image, credentials)));
        }
        if sender.send(message).is_err() {
            return;
        }
    }
}

fn ask_plainly(client: &Client, image: &str, credentials: Option<&Credentials>) -> Result<PullProgress, CallError> {
    let mut request = PullImageRequest::new();
    request.image.mut_or_insert_default().image = image.to_owned();
    if let Some(credentials) = credentials {
        let auth = request.auth.mut_or_insert_default();
        auth.username.clone_from(&credentials.username);
        auth.password.clone_from(&credentials.password);
    }
    let answer = client.images().pull_image(&request, FOREVER)?;
    Ok(PullProgress { reference: image.to_owned(), image_ref: answer.image_ref, ..PullProgress::default() })
}

/// What is shown on stderr. A bar is wiped away when it is dropped.
enum View {
    Bar(ProgressBar),
    /// The state of each layer that has been told.
    Lines {
        image: String,
        told: BTreeMap<String, String>,
    },
}

impl View {
    fn new(image: &str) -> View {
        if !std::io::stderr().is_terminal() {
            eprint(&format!("pulling {image}"));
            return View::Lines { image: image.to_owned(), told: BTreeMap::new() };
        }
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(one_line(image));
        // So that a pull without progress shows that it is alive.
        bar.enable_steady_tick(Duration::from_millis(120));
        View::Bar(bar)
    }

    fn show(&mut self, progress: &PullProgress) {
        match self {
            View::Bar(bar) if !progress.layers.is_empty() => {
                let sum = Sum::of(&progress.layers);
                if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} [{bar:30}] {msg}") {
                    bar.set_style(style.progress_chars("=> "));
                }
                bar.set_length(sum.total);
                bar.set_position(sum.bytes);
                bar.set_message(sum.to_string());
            }
            View::Bar(_) => {}
            View::Lines { image, told } => {
                for line in news(told, &progress.layers) {
                    eprint(&line);
                }
                if !progress.image_ref.is_empty() {
                    eprint(&format!("pulled {image} as {}", short_id(&progress.image_ref)));
                }
            }
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        if let View::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// A stderr that is gone does not stop a pull.
fn eprint(line: &str) {
    let _ = std::io::Write::write_all(&mut std::io::stderr().lock(), format!("{}\n", one_line(line)).as_bytes());
}

/// A line for each layer whose state has changed.
fn news(told: &mut BTreeMap<String, String>, layers: &[LayerProgress]) -> Vec<String> {
    let mut lines = Vec::new();
    for layer in layers.iter().filter(|layer| layer.state != "waiting") {
        let old = told.insert(layer.digest.clone(), layer.state.clone());
        if old.as_ref() != Some(&layer.state) {
            let total = u64::try_from(layer.total).unwrap_or(0);
            lines.push(format!("layer {}: {} ({})", short_id(&layer.digest), layer.state, size(total)));
        }
    }
    lines
}

/// All layers together.
#[derive(Debug, PartialEq, Eq)]
struct Sum {
    bytes: u64,
    total: u64,
    finished: usize,
    layers: usize,
}

impl Sum {
    fn of(layers: &[LayerProgress]) -> Sum {
        let mut sum = Sum { bytes: 0, total: 0, finished: 0, layers: layers.len() };
        for layer in layers {
            let total = u64::try_from(layer.total).unwrap_or(0);
            let finished = matches!(layer.state.as_str(), "done" | "exists");
            sum.total = sum.total.saturating_add(total);
            sum.bytes = sum.bytes.saturating_add(if finished { total } else { u64::try_from(layer.bytes).unwrap_or(0).min(total) });
            sum.finished += usize::from(finished);
        }
        sum
    }
}

impl std::fmt::Display for Sum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {}, {} of {} layers", size(self.bytes), size(self.total), self.finished, self.layers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(digest: &str, state: &str, bytes: i64, total: i64) -> LayerProgress {
        LayerProgress { digest: digest.into(), state: state.into(), bytes, total, ..LayerProgress::default() }
    }

    #[test]
    fn layers_are_summed() {
        let sum = Sum::of(&[layer("a", "exists", 0, 1000), layer("b", "pulling", 500, 2000), layer("c", "waiting", 0, 3000)]);
        assert_eq!(sum, Sum { bytes: 1500, total: 6000, finished: 1, layers: 3 });
        assert_eq!(sum.to_string(), "1.50 kB of 6.00 kB, 1 of 3 layers");
        // A daemon that lies must not make the bar run over.
        assert_eq!(Sum::of(&[layer("a", "pulling", 9, 5), layer("b", "pulling", -1, -1)]).bytes, 5);
    }

    #[test]
    fn a_layer_is_told_once_per_state() {
        let mut told = BTreeMap::new();
        assert!(news(&mut told, &[layer("sha256:a", "waiting", 0, 10)]).is_empty());
        assert_eq!(news(&mut told, &[layer("sha256:a", "pulling", 1, 10)]), ["layer a: pulling (10 B)"]);
        assert!(news(&mut told, &[layer("sha256:a", "pulling", 2, 10)]).is_empty());
        assert_eq!(news(&mut told, &[layer("sha256:a", "done", 10, 10)]), ["layer a: done (10 B)"]);
    }
}
