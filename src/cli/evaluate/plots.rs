//! Plots of a report as SVG: the reliability diagram and the histogram of margins.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::cli::failure::Failure;
use crate::rpc::pb;

/// Width and height of a plot in pixels.
const SIZE: (u32, u32) = (720, 560);
const FONT: &str = "sans-serif";
const CAPTION_SIZE: i32 = 20;
const BAR: RGBColor = RGBColor(70, 130, 180);
const CALIBRATED: RGBColor = RGBColor(200, 90, 40);

/// An area of a plot.
type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// Writes the plots into a folder, which is created if it does not exist, and returns their files.
///
/// # Errors
/// Returns a failure that names the file if it cannot be written.
pub(super) fn write(folder: &Path, report: &pb::EvaluationReport) -> Result<Vec<PathBuf>, Failure> {
    std::fs::create_dir_all(folder).map_err(|e| failed(folder, &e))?;
    let plots = [
        ("reliability.svg", reliability(report)),
        ("margins.svg", margins(report)),
    ];
    let mut files = Vec::new();
    for (name, svg) in plots {
        let path = folder.join(name);
        let svg = svg.map_err(|e| failed(&path, &e))?;
        std::fs::write(&path, svg).map_err(|e| failed(&path, &e))?;
        files.push(path);
    }
    Ok(files)
}

fn failed(path: &Path, reason: &dyn Display) -> Failure {
    Failure::Failed(format!(
        "--plots: {}: {reason}: name a folder that can be written",
        path.display()
    ))
}

/// Returns the bins that have samples as points of the diagram.
fn points(scores: Option<&pb::ProbabilityReport>) -> Vec<(f64, f64)> {
    let bins = scores.into_iter().flat_map(|scores| &scores.bins);
    bins.filter(|bin| bin.samples > 0)
        .map(|bin| (bin.predicted, bin.observed))
        .collect()
}

/// Draws the observed share of each bin over its mean predicted probability. On the diagonal the
/// probabilities are calibrated.
fn reliability(report: &pb::EvaluationReport) -> Result<String, String> {
    on_white(|canvas| draw_reliability(canvas, report).map_err(|e| e.to_string()))
}

/// Draws the number of pairs by margin.
fn margins(report: &pb::EvaluationReport) -> Result<String, String> {
    on_white(|canvas| draw_margins(canvas, report).map_err(|e| e.to_string()))
}

fn draw_reliability(canvas: &Canvas<'_>, report: &pb::EvaluationReport) -> Drawn {
    let calibrated = report.calibration.as_ref().and_then(|c| c.after.as_ref());
    let series = [
        ("Pr, all pairs", points(report.probability.as_ref()), BAR),
        ("calibrated, held-out half", points(calibrated), CALIBRATED),
    ];
    let ece = report.probability.as_ref().map_or(0.0, |p| p.ece);
    let mut chart = ChartBuilder::on(canvas)
        .caption(format!("Reliability, ECE {ece:.4}"), (FONT, CAPTION_SIZE))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..1.0, 0.0..1.0)?;
    chart
        .configure_mesh()
        .x_desc("predicted probability")
        .y_desc("share of wins")
        .draw()?;
    let diagonal = [(0.0, 0.0), (1.0, 1.0)];
    chart.draw_series(LineSeries::new(diagonal, BLACK.mix(0.4)))?;
    for (name, points, color) in series {
        if points.is_empty() {
            continue;
        }
        chart
            .draw_series(LineSeries::new(points.iter().copied(), color))?
            .label(name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 8, y + 4)], color.filled()));
        let circles = points.iter().map(|p| Circle::new(*p, 4, color.filled()));
        chart.draw_series(circles)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font((FONT, 13))
        .draw()
}

fn draw_margins(canvas: &Canvas<'_>, report: &pb::EvaluationReport) -> Drawn {
    let histogram = report.margins.clone().unwrap_or_default();
    let first = histogram.edges.first().copied().unwrap_or(-0.5);
    let last = histogram.edges.last().copied().unwrap_or(0.5);
    let highest: u64 = histogram.counts.iter().copied().max().unwrap_or(0).max(1);
    let title = format!("Margins of {} pairs", report.pairs);
    let mut chart = ChartBuilder::on(canvas)
        .caption(title, (FONT, CAPTION_SIZE))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(56)
        .build_cartesian_2d(first..last, 0..highest + highest.div_ceil(20))?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_desc("reward of the chosen − reward of the rejected answer")
        .y_desc("pairs")
        .draw()?;
    let ranges = histogram.edges.windows(2).zip(&histogram.counts);
    chart.draw_series(ranges.map(|(edges, count)| {
        Rectangle::new([(edges[0], 0), (edges[1], *count)], BAR.mix(0.8).filled())
    }))?;
    if first <= 0.0 && last >= 0.0 {
        let zero = [(0.0, 0), (0.0, highest)];
        chart.draw_series(LineSeries::new(zero, BLACK.mix(0.6)))?;
    }
    Ok(())
}

/// Returns the SVG of what `draw` draws on a white canvas.
fn on_white(draw: impl FnOnce(&Canvas<'_>) -> Result<(), String>) -> Result<String, String> {
    let mut svg = String::new();
    {
        let canvas = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        canvas.fill(&WHITE).map_err(|e| e.to_string())?;
        draw(&canvas)?;
        canvas.present().map_err(|e| e.to_string())?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_report_has_plots_too() {
        let empty = pb::EvaluationReport::default();
        for svg in [reliability(&empty).unwrap(), margins(&empty).unwrap()] {
            assert!(
                svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"),
                "{svg}"
            );
        }
    }

    #[test]
    fn every_bin_with_samples_is_a_point_and_every_range_a_bar() {
        let bin = |samples, predicted| pb::ReliabilityBin {
            samples,
            predicted,
            observed: predicted,
            ..Default::default()
        };
        let report = pb::EvaluationReport {
            probability: Some(pb::ProbabilityReport {
                bins: vec![bin(2, 0.2), bin(0, 0.0), bin(3, 0.8)],
                ..Default::default()
            }),
            margins: Some(pb::MarginHistogram {
                edges: vec![-1.0, 0.0, 1.0],
                counts: vec![3, 4],
            }),
            ..Default::default()
        };
        let diagram = reliability(&report).unwrap();
        assert_eq!(diagram.matches("<circle").count(), 2, "{diagram}");
        let bars = |svg: &str| svg.matches("<rect").count();
        let without = pb::EvaluationReport::default();
        let with_bars = margins(&report).unwrap();
        assert_eq!(bars(&with_bars), bars(&margins(&without).unwrap()) + 2);
    }
}
