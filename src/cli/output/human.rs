//! Quantities for people.

/// Formats a number of bytes: `512 B`, `2.0 GiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut scaled = n as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would be printed as 1024.0.
    while scaled >= 1023.95 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    format!("{scaled:.1} {}", UNITS[unit])
}

/// Formats a duration in seconds with at most two units: `0.4 s`, `45 s`, `4 min`, `2 h 5 min`,
/// `3 d 4 h`.
pub fn seconds(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return format!("{seconds} s");
    }
    if seconds < 9.95 {
        return format!("{} s", (seconds * 10.0).round() / 10.0);
    }
    let whole = seconds.round() as u64;
    let minutes = (whole as f64 / 60.0).round() as u64;
    let hours = (whole as f64 / 3600.0).round() as u64;
    match whole {
        0..=99 => format!("{whole} s"),
        100..=3569 => format!("{minutes} min"),
        3570..=172_799 => two(minutes / 60, "h", minutes % 60, "min"),
        _ => two(hours / 24, "d", hours % 24, "h"),
    }
}

fn two(large: u64, large_unit: &str, small: u64, small_unit: &str) -> String {
    match small {
        0 => format!("{large} {large_unit}"),
        small => format!("{large} {large_unit} {small} {small_unit}"),
    }
}

/// Formats a number of parameters: `34K`, `135M`, `8.03B`.
pub fn parameters(n: u64) -> String {
    let millions = n as f64 / 1e6;
    if millions < 0.9995 {
        return format!("{:.0}K", millions * 1e3);
    }
    match millions < 999.5 {
        true => format!("{millions:.0}M"),
        false => format!("{:.2}B", millions / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_have_few_digits_and_a_unit() {
        assert_eq!(
            [0, 1023, 1024, 2 << 30, (1 << 20) - 1, u64::MAX].map(bytes),
            ["0 B", "1023 B", "1.0 KiB", "2.0 GiB", "1.0 MiB", "16.0 EiB"].map(str::to_owned)
        );
        let durations = [
            0.0, 0.42, 9.94, 9.96, 45.4, 99.6, 244.0, 3569.0, 3571.0, 7500.0, 172_799.0, 273_600.0,
        ];
        assert_eq!(
            durations.map(seconds),
            [
                "0 s",
                "0.4 s",
                "9.9 s",
                "10 s",
                "45 s",
                "2 min",
                "4 min",
                "59 min",
                "1 h",
                "2 h 5 min",
                "48 h",
                "3 d 4 h"
            ]
            .map(str::to_owned)
        );
        assert_eq!(
            [123_456, 134_515_008, 999_885_952, 8_030_261_248].map(parameters),
            ["123K", "135M", "1.00B", "8.03B"].map(str::to_owned)
        );
    }
}
