//! Pulling an image with something to look at: bars on a terminal, lines otherwise.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use crossbeam_channel::{select, Receiver, Sender};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use nix::sys::signal::Signal;

use super::client::{Client, FOREVER};
use super::failure::{one_line, CallError, During, Failure, Outcome};
use super::flags::Credentials;
use super::interrupt;
use super::table::{short_id, size};
use crate::api::admin::{LayerProgress, PullProgress, PullRequest};
use crate::api::runtime::PullImageRequest;

/// Layers with a bar, at most: a terminal has some twenty lines.
const BARS: usize = 10;
/// Between two lines about the whole.
const SUMMARY: Duration = Duration::from_secs(10);

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

/// What is shown on stderr. Bars are wiped away when they are dropped.
enum View {
    Bars(Bars),
    Lines(Lines),
}

impl View {
    fn new(image: &str) -> View {
        if !std::io::stderr().is_terminal() {
            eprint(&format!("pulling {image}"));
            return View::Lines(Lines { image: image.to_owned(), told: BTreeMap::new(), last: Instant::now() });
        }
        View::Bars(Bars::new(image, MultiProgress::new()))
    }

    fn show(&mut self, progress: &PullProgress) {
        match self {
            View::Bars(bars) => bars.show(progress),
            View::Lines(lines) => lines.news(progress, Instant::now()).iter().for_each(|line| eprint(line)),
        }
    }
}

/// A bar for the whole and one for each layer that moves.
struct Bars {
    screen: MultiProgress,
    whole: ProgressBar,
    layers: BTreeMap<usize, ProgressBar>,
}

impl Bars {
    fn new(image: &str, screen: MultiProgress) -> Bars {
        let whole = screen.add(ProgressBar::new(0));
        whole.set_style(style("{spinner} {prefix} {msg}"));
        whole.set_prefix(one_line(image));
        // So that a pull without progress shows that it is alive.
        whole.enable_steady_tick(Duration::from_millis(120));
        Bars { screen, whole, layers: BTreeMap::new() }
    }

    fn show(&mut self, progress: &PullProgress) {
        if progress.layers.is_empty() {
            return;
        }
        let sum = Sum::of(&progress.layers);
        self.whole.set_style(style("{spinner} {prefix} [{bar:30}] {msg}"));
        self.whole.set_length(sum.total);
        self.whole.set_position(sum.bytes);
        self.whole.set_message(format!("{sum}{}", speed(progress)));
        for (at, layer) in progress.layers.iter().enumerate() {
            if !moves(layer) {
                if let Some(bar) = self.layers.remove(&at) {
                    bar.finish_and_clear();
                    self.screen.remove(&bar);
                }
            } else if self.layers.contains_key(&at) || self.layers.len() < BARS {
                let bar = self.layers.entry(at).or_insert_with(|| {
                    let bar = self.screen.add(ProgressBar::new(unsigned(layer.total)));
                    bar.set_style(style("  {prefix} [{bar:30}] {msg}"));
                    bar.set_prefix(short_id(&layer.digest));
                    bar
                });
                bar.set_length(unsigned(layer.total));
                bar.set_position(unsigned(layer.bytes).min(unsigned(layer.total)));
                bar.set_message(state(layer));
            }
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        for bar in self.layers.values().chain([&self.whole]) {
            bar.finish_and_clear();
        }
    }
}

/// A line for each layer whose state has changed, and now and then one for the whole.
struct Lines {
    image: String,
    /// The state of each layer that has been told.
    told: BTreeMap<usize, String>,
    /// When something was said about the whole.
    last: Instant,
}

impl Lines {
    fn news(&mut self, progress: &PullProgress, now: Instant) -> Vec<String> {
        let mut lines = Vec::new();
        for (at, layer) in progress.layers.iter().enumerate().filter(|(_, layer)| layer.state != "waiting") {
            let old = self.told.insert(at, layer.state.clone());
            if old.as_ref() != Some(&layer.state) {
                lines.push(format!("layer {}: {} ({})", short_id(&layer.digest), layer.state, size(unsigned(layer.total))));
            }
        }
        if !progress.layers.is_empty() && progress.image_ref.is_empty() && now.duration_since(self.last) >= SUMMARY {
            self.last = now;
            lines.push(format!("{}{}", Sum::of(&progress.layers), speed(progress)));
        }
        if !progress.image_ref.is_empty() {
            lines.push(format!("pulled {} as {}", self.image, short_id(&progress.image_ref)));
        }
        lines
    }
}

/// A template is a constant; one that is wrong gives indicatif's own look.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

fn unsigned(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

fn moves(layer: &LayerProgress) -> bool {
    matches!(layer.state.as_str(), "downloading" | "retrying" | "unpacking")
}

/// What a layer's bar says.
fn state(layer: &LayerProgress) -> String {
    let speed = if layer.bytes_per_second > 0 { format!(", {}/s", size(unsigned(layer.bytes_per_second))) } else { String::new() };
    match layer.state.as_str() {
        "unpacking" => format!("unpacking, {}", size(unsigned(layer.total))),
        word => format!(
            "{}{} of {}{speed}",
            if word == "retrying" { "retrying, " } else { "" },
            size(unsigned(layer.bytes)),
            size(unsigned(layer.total))
        ),
    }
}

/// Speed and time left of the whole, as far as they are known.
fn speed(progress: &PullProgress) -> String {
    let mut text = String::new();
    if progress.bytes_per_second > 0 {
        text.push_str(&format!(", {}/s", size(unsigned(progress.bytes_per_second))));
    }
    if progress.eta_milliseconds > 0 {
        text.push_str(&format!(", {} left", duration(unsigned(progress.eta_milliseconds).div_ceil(1000))));
    }
    text
}

/// Seconds in their two largest units.
fn duration(seconds: u64) -> String {
    match seconds {
        0..=59 => format!("{seconds} s"),
        60..=3599 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// A stderr that is gone does not stop a pull.
fn eprint(line: &str) {
    let _ = std::io::Write::write_all(&mut std::io::stderr().lock(), format!("{}\n", one_line(line)).as_bytes());
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
            let total = unsigned(layer.total);
            let finished = matches!(layer.state.as_str(), "done" | "exists");
            sum.total = sum.total.saturating_add(total);
            sum.bytes = sum.bytes.saturating_add(if finished { total } else { unsigned(layer.bytes).min(total) });
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
        let sum = Sum::of(&[layer("a", "exists", 0, 1000), layer("b", "downloading", 500, 2000), layer("c", "waiting", 0, 3000)]);
        assert_eq!(sum, Sum { bytes: 1500, total: 6000, finished: 1, layers: 3 });
        assert_eq!(sum.to_string(), "1.50 kB of 6.00 kB, 1 of 3 layers");
        // A daemon that lies must not make the bar run over.
        assert_eq!(Sum::of(&[layer("a", "downloading", 9, 5), layer("b", "downloading", -1, -1)]).bytes, 5);
    }

    fn progress(layers: Vec<LayerProgress>, speed: i64, eta: i64) -> PullProgress {
        PullProgress { layers, bytes_per_second: speed, eta_milliseconds: eta, ..PullProgress::default() }
    }

    #[test]
    fn a_layer_is_told_once_per_state() {
        let begin = Instant::now();
        let mut lines = Lines { image: "i".into(), told: BTreeMap::new(), last: begin };
        let mut news = |layers: &[LayerProgress], seconds| {
            lines.news(&progress(layers.to_vec(), 2_000_000, 61_200), begin + Duration::from_secs(seconds))
        };
        assert!(news(&[layer("sha256:a", "waiting", 0, 10)], 0).is_empty());
        assert_eq!(news(&[layer("sha256:a", "downloading", 1, 10)], 1), ["layer a: downloading (10 B)"]);
        assert!(news(&[layer("sha256:a", "downloading", 2, 10)], 2).is_empty());
        let whole = "3 B of 10 B, 0 of 1 layers, 2.00 MB/s, 1 min 2 s left";
        assert_eq!(news(&[layer("sha256:a", "downloading", 3, 10)], 11), [whole]);
        assert_eq!(news(&[layer("sha256:a", "unpacking", 10, 10)], 12), ["layer a: unpacking (10 B)"]);
        assert_eq!(news(&[layer("sha256:a", "done", 10, 10)], 12), ["layer a: done (10 B)"]);
        let end = PullProgress { image_ref: "sha256:0123456789abcdef".into(), ..progress(Vec::new(), 0, 0) };
        assert_eq!(lines.news(&end, begin + Duration::from_secs(60)), ["pulled i as 0123456789abc"]);
    }

    #[test]
    fn bars_are_those_of_layers_that_move() {
        let screen = MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden());
        let mut bars = Bars::new("i", screen);
        let mut layers: Vec<_> = (0..30).map(|i| layer(&format!("sha256:{i}"), "downloading", 5, 10)).collect();
        layers[0].state = "exists".into();
        bars.show(&progress(layers.clone(), 0, 0));
        assert_eq!(bars.layers.keys().copied().collect::<Vec<_>>(), (1..=BARS).collect::<Vec<_>>());
        assert_eq!((bars.whole.position(), bars.whole.length()), (10 + 29 * 5, Some(300)));
        layers[1].state = "done".into();
        layers[2].state = "retrying".into();
        layers[3].bytes_per_second = 7000;
        bars.show(&progress(layers.clone(), 0, 0));
        bars.show(&progress(layers, 0, 0));
        assert!(!bars.layers.contains_key(&1) && bars.layers.contains_key(&(BARS + 1)));
        assert_eq!(bars.layers[&2].message(), "retrying, 5 B of 10 B");
        assert_eq!(bars.layers[&3].message(), "5 B of 10 B, 7.00 kB/s");
        assert_eq!(bars.layers[&3].prefix(), "3");
    }

    #[test]
    fn times() {
        for (seconds, text) in [(0, "0 s"), (59, "59 s"), (60, "1 min 0 s"), (3600, "1 h 0 min"), (90_061, "25 h 1 min")] {
            assert_eq!(duration(seconds), text);
        }
    }
}
